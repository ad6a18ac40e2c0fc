"""The embedding store (Redis), its circuit breaker, and the memory cache in front of it."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec, Protocol, TypeVar

import structlog
from pydantic import SecretStr
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from shared.embedding import Embedding, EmbeddingFormat, EmbeddingInfo
from shared.lru import LruCache
from shared.settings import EmbeddingStoreSettings

log = structlog.get_logger()
T = TypeVar("T")
P = ParamSpec("P")
_INLINE_BYTES = 256 << 10
_GROUPS_AT_ONCE = 2  # of one embedding: one is on the way while the other is verified
# Of all embeddings: 8 MiB on the way, which a link of 1 Gbit/s carries well within the timeout of each.
_TRANSFERS_AT_ONCE = 4


class EmbeddingStore(Protocol):
    """Keeps embeddings by digest until they expire or are evicted. Safe to share between tasks.

    Absence, failure and damage are misses: nothing is raised but the caller's own cancellation.
    """

    async def describe(self, digest: str) -> EmbeddingInfo | None:
        """Return what is stored under `digest` if all of it is there, without reading it; None is a miss."""

    async def get(self, digest: str) -> Embedding | None:
        """Return the embedding; None is a miss. What does not verify is deleted and is a miss."""

    async def put(self, embedding: Embedding) -> bool:
        """Store the embedding; return whether that worked."""

    async def delete(self, digest: str) -> None:
        """Forget the embedding."""


class LocalEmbeddingCache:
    """Embeddings in this process's memory, least recently used first out, bounded in bytes. One thread only."""

    def __init__(self, max_bytes: int) -> None:
        self._cache = LruCache[Embedding](max_bytes, lambda embedding: embedding.info.size_bytes)

    @property
    def size_bytes(self) -> int:
        """Bytes of all embeddings that are kept."""
        return self._cache.size_bytes

    def get(self, digest: str) -> Embedding | None:
        """Return the embedding and mark it as just used; None is a miss."""
        return self._cache.get(digest)

    def put(self, embedding: Embedding) -> None:
        """Keep the embedding, dropping the least recently used ones to stay within the bound."""
        self._cache.put(embedding.digest, embedding)


class CircuitBreaker:
    """Stops calling what keeps failing: open after `threshold` failures in a row, then one probe per `pause_s`."""

    def __init__(self, threshold: int = 3, pause_s: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._threshold = threshold
        self._pause_s = pause_s
        self._clock = clock
        self._failures = 0
        self._next_probe = 0.0

    @property
    def is_open(self) -> bool:
        """Whether calls are being refused."""
        return self._failures >= self._threshold

    def allow(self) -> bool:
        """Return whether a call may be made now; while open, the call that gets True is the probe."""
        if not self.is_open:
            return True
        now = self._clock()
        if now < self._next_probe:
            return False
        self._next_probe = now + self._pause_s
        return True

    def record(self, *, success: bool) -> None:
        """Note how a call ended."""
        if success:
            self._failures = 0
        else:
            self._failures += 1
            self._next_probe = self._clock() + self._pause_s


class RedisEmbeddingStore:
    """Embeddings in Redis, one value per group of rows; see `shared.embedding` for the values.

    Every value travels on its own, so that the client's timeout bounds 2 MiB and not a whole embedding.
    """

    def __init__(self, redis: Redis, value_format: EmbeddingFormat, ttl_s: int, breaker: CircuitBreaker) -> None:
        self._redis = redis
        self._format = value_format
        self._ttl_s = ttl_s
        self._breaker = breaker
        self._transfers = asyncio.Semaphore(_TRANSFERS_AT_ONCE)

    async def describe(self, digest: str) -> EmbeddingInfo | None:
        """Return what is stored under `digest` if all of it is there; None is a miss."""
        info = await self._manifest(digest)
        if info is None:
            return None
        keys = [_group_key(digest, index) for index in range(info.group_count)]
        present = await self._attempt(lambda: self._redis.exists(*keys))
        return info if present == info.group_count else None

    async def get(self, digest: str) -> Embedding | None:
        """Return the embedding; None is a miss. What does not verify is deleted."""
        info = await self._manifest(digest)
        if info is None:
            return None
        try:
            payload = await _off_loop(info, bytearray, info.size_bytes)
        except MemoryError:
            return None
        complete = await self._for_groups(info, lambda index: self._read_group(digest, info, index, payload))
        return Embedding(digest, info, payload) if complete else None

    async def put(self, embedding: Embedding) -> bool:
        """Store the groups, then the manifest, so that a manifest never precedes what it lists."""
        if not embedding.info.plausible():
            return False
        complete = await self._for_groups(embedding.info, lambda index: self._write_group(embedding, index))
        return complete and await self._set(_key(embedding.digest), self._format.pack_manifest(embedding))

    async def delete(self, digest: str) -> None:
        """Forget the manifest; groups without one expire."""
        await self._attempt(lambda: self._redis.delete(_key(digest)))

    async def _manifest(self, digest: str) -> EmbeddingInfo | None:
        value = await self._attempt(lambda: self._redis.get(_key(digest)))
        if value is None:
            return None
        info = self._format.unpack_manifest(digest, value)
        if info is None:
            await self._reject(digest)
        return info

    async def _read_group(self, digest: str, info: EmbeddingInfo, index: int, payload: bytearray) -> bool:
        value = await self._attempt(lambda: self._redis.get(_group_key(digest, index)))
        if value is None:
            return False
        verified = await _off_loop(info, self._format.unpack_group, digest, info, index, value, payload)
        if not verified:
            await self._reject(digest)
        return verified

    async def _write_group(self, embedding: Embedding, index: int) -> bool:
        value = await _off_loop(embedding.info, self._format.pack_group, embedding, index)
        return await self._set(_group_key(embedding.digest, index), value)

    async def _set(self, key: str, value: bytes) -> bool:
        return await self._attempt(lambda: self._redis.set(key, value, ex=self._ttl_s)) is not None

    async def _reject(self, digest: str) -> None:
        log.warning("stored_embedding_rejected", digest=digest)
        await self.delete(digest)

    async def _for_groups(self, info: EmbeddingInfo, work: Callable[[int], Awaitable[bool]]) -> bool:
        """Do `work` for every group, a few at a time, until one fails; return whether none did."""
        waiting = deque(range(info.group_count))

        async def worker() -> bool:
            while waiting:
                async with self._transfers:
                    if waiting and not await work(waiting.popleft()):
                        waiting.clear()
                        return False
            return True

        async with asyncio.TaskGroup() as group:
            workers = [group.create_task(worker()) for _ in range(min(_GROUPS_AT_ONCE, info.group_count))]
        return all(task.result() for task in workers)

    async def _attempt(self, command: Callable[[], Awaitable[Any]]) -> Any | None:
        """Return the answer to a Redis command; None when it fails or the breaker is open."""
        if not self._breaker.allow():
            return None
        try:
            answer = await command()
        except (RedisError, OSError, ValueError) as error:  # ValueError: an answer that is not UTF-8 where it should be
            # A server that refuses (another type under the key, memory full) is there, unless it lets nobody in.
            self._breaker.record(success=isinstance(error, ResponseError))
            log.warning("embedding_store_failed", error=type(error).__name__, breaker_open=self._breaker.is_open)
            return None
        self._breaker.record(success=True)
        return answer


class NoEmbeddingStore:
    """The store of a service that runs without one: always a miss."""

    async def describe(self, digest: str) -> EmbeddingInfo | None:
        """Miss."""
        return None

    async def get(self, digest: str) -> Embedding | None:
        """Miss."""
        return None

    async def put(self, embedding: Embedding) -> bool:
        """Keep nothing."""
        return False

    async def delete(self, digest: str) -> None:
        """Nothing to forget."""


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


def open_embedding_store(redis: Redis | None, settings: EmbeddingStoreSettings) -> EmbeddingStore:
    """Return the store that the settings describe over `redis`; None is a service without one."""
    if redis is None:
        return NoEmbeddingStore()
    value_format = EmbeddingFormat(settings.embedding_key.get_secret_value())
    return RedisEmbeddingStore(redis, value_format, settings.embedding_ttl_s, CircuitBreaker())


def _key(digest: str) -> str:
    return f"ivl:embedding:{digest}"


def _group_key(digest: str, index: int) -> str:
    return f"{_key(digest)}:{index}"


async def _off_loop(info: EmbeddingInfo, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do what copies and hashes a group: in a thread where that would hold the event loop up."""
    if info.size_bytes <= _INLINE_BYTES:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)
