"""The way to a Redis that a request can do without: bounded in time, and not tried while nobody answers."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, Literal, TypeVar

import structlog
from pydantic import SecretStr
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from shared import tracing
from shared.breaker import CircuitBreaker, ProbedBreaker
from shared.bulk import StoreAway, StoreRefused
from shared.metrics import StoreObserver
from shared.patience import Patience
from shared.settings import EmbeddingStoreSettings
from shared.store_metrics import UNOBSERVED
from shared.tasks import cancelled

log = structlog.get_logger()
T = TypeVar("T")
_SOCKET_SHARE: Final = 4
FAILURES: Final = (RedisError, OSError, TimeoutError, ValueError)  # ValueError: no UTF-8 where redis-py expects it


class StoreFailed(Exception):
    """There was no answer, or a refusal; it has been logged. `reason` is what an observer is told of."""

    def __init__(self, reason: Literal["refused", "failed", "breaker_open"]) -> None:
        super().__init__(reason)
        self.reason = reason


class RedisLink:
    """A client, what may be waited for it, and the breaker that all who use it share. One event loop only."""

    def __init__(
        self, redis: Redis, breaker: CircuitBreaker, timeout_s: float = 0.25, observer: StoreObserver = UNOBSERVED
    ) -> None:
        self.redis = redis
        self.breaker = breaker
        self.timeout_s = timeout_s
        self.observer = observer

    async def attempt(self, name: str, command: Callable[[], Awaitable[T]], patience: Patience | None = None) -> T:
        """Return what a command answers; raise `StoreFailed` where it does not within `patience`, or may not be tried.

        No patience: as long as one answer may take. `name` is what an observer is told.
        """
        if not self.breaker.allow():
            self.observer.command_ended(name, "skipped")
            raise StoreFailed("breaker_open")
        try:
            with tracing.span(f"redis {name}", {"db.system.name": "redis", "db.operation.name": name}, "client"):
                answer = await (patience or Patience(self.timeout_s)).bound(command)
        except (*FAILURES, StoreAway, StoreRefused) as error:
            # A server that refuses (another type under the key, memory full) is there, unless it lets nobody in.
            lives = isinstance(error, ResponseError | StoreRefused)
            self.breaker.record(success=lives)
            self.observer.command_ended(name, "refused" if lives else "failed")
            log.warning("embedding_store_failed", error=type(error).__name__, breaker_open=self.breaker.is_open)
            raise StoreFailed("refused" if lives else "failed") from error
        self.breaker.record(success=True)
        self.observer.command_ended(name, "ok")
        return answer

    async def ask(self, name: str, command: Callable[[], Awaitable[Any]], patience: Patience | None = None) -> Any:
        """Return what a command answers; None where it does not."""
        with suppress(StoreFailed):
            return await self.attempt(name, command, patience)
        return None


def connect_redis(url: SecretStr | str, timeout_s: float, max_connections: int = 32) -> Redis:
    """Return a client that waits at most `timeout_s` for an answer and never retries by itself; close with `aclose`."""
    pool = BlockingConnectionPool.from_url(
        url if isinstance(url, str) else url.get_secret_value(),
        max_connections=max_connections,
        timeout=timeout_s,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
    )
    return Redis.from_pool(pool)


@asynccontextmanager
async def open_link(
    settings: EmbeddingStoreSettings, observer: StoreObserver = UNOBSERVED
) -> AsyncIterator[RedisLink | None]:
    """Yield the link to the Redis of embeddings; None where the settings name none.

    Its breaker, once open, is closed by probes in the background, and never by a request.
    """
    if not settings.redis_url:
        yield None
        return
    # What bounds a request is its patience, which knows the store's delays from this process's own; a socket does not.
    async with connect_redis(settings.redis_url, _SOCKET_SHARE * settings.redis_timeout_s) as redis:
        breaker = ProbedBreaker(redis.ping, FAILURES, changed=lambda is_open: observer.breaker_changed(is_open=is_open))
        probing = asyncio.create_task(breaker.run())
        try:
            yield RedisLink(redis, breaker, settings.redis_timeout_s, observer)
        finally:
            await cancelled(probing)
