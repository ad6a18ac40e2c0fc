"""Embeddings to store, and stores over a real server."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shared.breaker import CircuitBreaker, ProbedBreaker
from shared.bulk import BulkConnections
from shared.embedding import DataType, Embedding, EmbeddingInfo, EmbeddingKey
from shared.embedding_values import EmbeddingFormat
from shared.metrics import CacheName, CommandOutcome, DropReason, StoreObserver
from shared.redis_link import FAILURES, RedisLink, connect_redis
from shared.store import RedisEmbeddingStore
from shared.store_metrics import UNOBSERVED
from shared.write_queue import DEFAULT_LIMITS, QueueLimits

DIGEST, MEDIA = "ab" * 32, "cd" * 32
KEY = EmbeddingKey(DIGEST, MEDIA, "acme")


def info_of(
    tiles: int = 3, tokens_per_tile: int = 4, hidden: int = 8, data_type: DataType = "bfloat16"
) -> EmbeddingInfo:
    return EmbeddingInfo(tiles, tiles * tokens_per_tile, hidden, data_type, 640, 480, 2, 1)


def embedding(tiles: int = 13, hidden: int = 896, key: EmbeddingKey = KEY, tokens_per_tile: int = 256) -> Embedding:
    info = info_of(tiles, tokens_per_tile, hidden)
    return Embedding(key, info, random.Random(repr(key)).randbytes(info.size_bytes))


def key_of(index: int, media: int = 0, tenant: str = "acme") -> EmbeddingKey:
    return EmbeddingKey(f"{index:064x}", f"{media:064x}", tenant)


class Recorder:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.commands: list[tuple[str, CommandOutcome]] = []
        self.dropped: list[DropReason] = []
        self.breaker: list[bool] = []
        self.queued: list[tuple[int, int]] = []
        self.evicted = 0

    def command_ended(self, command: str, outcome: CommandOutcome) -> None:
        self.commands.append((command, outcome))

    def breaker_changed(self, *, is_open: bool) -> None:
        self.breaker.append(is_open)

    def write_queue_changed(self, items: int, size_bytes: int) -> None:
        self.queued.append((items, size_bytes))

    def write_dropped(self, reason: DropReason) -> None:
        self.dropped.append(reason)

    def cache_changed(self, cache: CacheName, size_bytes: int) -> None:
        pass

    def cache_evicted(self, cache: CacheName, count: int = 1) -> None:
        self.evicted += count


@asynccontextmanager
async def store_over(
    url: str,
    key: str = "k",
    timeout_s: float = 10.0,  # far above what an answer takes on a busy machine
    breaker: CircuitBreaker | None = None,
    limits: QueueLimits = DEFAULT_LIMITS,
    probe_every_s: float = 0.02,
    observer: StoreObserver = UNOBSERVED,
) -> AsyncIterator[tuple[RedisEmbeddingStore, RedisLink]]:
    """Yield a store that writes, and the link that it uses; a breaker that is not given is probed."""
    async with connect_redis(url, timeout_s) as redis:
        probed = ProbedBreaker(redis.ping, FAILURES, every_s=probe_every_s)
        probing = asyncio.create_task(probed.run())
        link = RedisLink(redis, breaker or probed, timeout_s, observer)
        connections = BulkConnections(url, timeout_s)
        try:
            async with RedisEmbeddingStore(link, connections, EmbeddingFormat(key), 60, limits) as store:
                yield store, link
        finally:
            probing.cancel()
            await asyncio.gather(probing, return_exceptions=True)
