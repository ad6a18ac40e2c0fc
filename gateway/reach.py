"""Turns a Redis that cannot be used into `StoreUnavailable`."""

from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from redis.exceptions import RedisError

from shared.errors import StoreUnavailable

log = structlog.get_logger()


@contextmanager
def reaching_store() -> Iterator[None]:
    """Raise `StoreUnavailable` where Redis cannot be reached, does not answer in time, or refuses."""
    try:
        yield
    except (RedisError, OSError, TimeoutError) as error:
        log.warning("store_failed", error=type(error).__name__)
        raise StoreUnavailable(
            "The store of conversations and media cannot be reached; try again.", retry_after_s=1.0
        ) from error
