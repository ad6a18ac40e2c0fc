"""Turns a Redis that cannot be used into `StoreUnavailable`."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from redis.exceptions import RedisError

from shared import tracing
from shared.errors import StoreUnavailable

log = structlog.get_logger()


@contextmanager
def reaching_store() -> Iterator[None]:
    """Raise `StoreUnavailable` where Redis cannot be reached, does not answer in time, or refuses.

    A cancellation that was lost inside is raised at the end: redis-py writes under `asyncio.wait_for`, which forgets
    one that comes just when the writing is done (before Python 3.12).
    """
    cancellations = _cancellations()
    span, failure = tracing.begin("redis", {"db.system.name": "redis"}, "client"), ""
    try:
        yield
    except (RedisError, OSError, TimeoutError) as error:
        failure = type(error).__name__
        log.warning("store_failed", error=failure)
        if _cancellations() > cancellations:
            raise asyncio.CancelledError from error
        raise StoreUnavailable(
            "The store of conversations and media cannot be reached; try again.", retry_after_s=1.0
        ) from error
    finally:
        span.end(failure)
    if _cancellations() > cancellations:
        raise asyncio.CancelledError


def _cancellations() -> int:
    """Return how many times the current task was asked to end."""
    task = asyncio.current_task()
    return task.cancelling() if task else 0
