"""The embedding store over a real server: what is stored comes back verified, and its absence is only ever a miss."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis

from shared.embedding import Embedding, EmbeddingFormat, EmbeddingInfo
from shared.store import CircuitBreaker, LocalEmbeddingCache, NoEmbeddingStore, RedisEmbeddingStore, connect_redis
from tests.valkey import Valkey, running_valkey

DIGEST = "ab" * 32


def embedding(tiles: int = 13, hidden: int = 896, digest: str = DIGEST) -> Embedding:
    info = EmbeddingInfo(tiles, tiles * 256, hidden, "bfloat16", 640, 480, 4, 3)
    return Embedding(digest, info, random.Random(digest).randbytes(info.size_bytes))


@pytest.fixture
async def valkey() -> AsyncIterator[Valkey]:
    async with running_valkey() as server:
        yield server


@asynccontextmanager
async def opened(valkey: Valkey, key: str = "k") -> AsyncIterator[tuple[RedisEmbeddingStore, Redis]]:
    redis = connect_redis(valkey.url, 0.25)
    try:
        yield RedisEmbeddingStore(redis, EmbeddingFormat(key), 60, CircuitBreaker(pause_s=0.1)), redis
    finally:
        await redis.aclose()


async def test_what_is_put_can_be_described_and_read(valkey: Valkey) -> None:
    async with opened(valkey) as (store, redis):
        assert await store.describe(DIGEST) is None
        assert await store.get(DIGEST) is None
        assert await store.put(embedding())
        assert await store.describe(DIGEST) == embedding().info
        read = await store.get(DIGEST)
        assert read is not None
        assert bytes(read.payload) == bytes(embedding().payload)
        lengths = [await redis.strlen(key) for key in await redis.keys()]
        assert max(lengths) <= (2 << 20) + 256
        assert all([0 < await redis.ttl(key) <= 60 for key in await redis.keys()])


async def test_an_embedding_that_lost_a_group_is_a_miss_and_can_be_put_again(valkey: Valkey) -> None:
    async with opened(valkey) as (store, redis):
        await store.put(embedding())
        await redis.delete(f"ivl:embedding:{DIGEST}:1")
        assert await store.describe(DIGEST) is None
        assert await store.get(DIGEST) is None
        await store.put(embedding())
        assert await store.get(DIGEST) is not None


async def test_a_damaged_group_is_a_miss_and_is_forgotten(valkey: Valkey) -> None:
    async with opened(valkey) as (store, redis):
        await store.put(embedding())
        await redis.setrange(f"ivl:embedding:{DIGEST}:0", 5000, b"\x00\x01\x02")
        assert await store.get(DIGEST) is None
        assert await store.describe(DIGEST) is None, "the next encode writes it anew"


async def test_values_of_another_type_or_key_are_misses(valkey: Valkey) -> None:
    async with opened(valkey) as (store, redis), opened(valkey, key="other") as (foreign, _):
        await redis.lpush(f"ivl:embedding:{DIGEST}", "x")
        assert await store.get(DIGEST) is None
        await redis.flushall()
        await foreign.put(embedding())
        assert await store.get(DIGEST) is None


async def test_a_server_that_dies_and_comes_back_is_a_miss_in_between(valkey: Valkey) -> None:
    async with opened(valkey) as (store, _):
        await store.put(embedding())
        valkey.kill()
        for _ in range(5):
            assert await store.get(DIGEST) is None
            assert not await store.put(embedding())
        await valkey.restart()
        for _ in range(100):
            if await store.put(embedding()):
                break
            await asyncio.sleep(0.05)
        assert await store.get(DIGEST) is not None


async def test_a_frozen_server_is_a_miss_within_the_timeout_and_costs_nothing_once_the_breaker_is_open(
    valkey: Valkey,
) -> None:
    async with opened(valkey) as (store, _):
        await store.put(embedding())
        with valkey.frozen():
            async with asyncio.timeout(3):  # three timeouts of 0.25 s, then none
                for _ in range(50):
                    assert await store.get(DIGEST) is None


async def test_a_full_server_refuses_quietly(valkey: Valkey) -> None:
    async with opened(valkey) as (store, redis):
        await redis.config_set("maxmemory", "3mb")
        await redis.config_set("maxmemory-policy", "noeviction")
        assert not await store.put(embedding())
        assert await store.get(DIGEST) is None


async def test_a_hundred_readers_at_once_all_read_the_right_value(valkey: Valkey) -> None:
    async with opened(valkey) as (store, _):
        small = [embedding(tiles=1, hidden=64, digest=f"{index:064x}") for index in range(20)]
        for entry in small:
            await store.put(entry)
        reads = await asyncio.gather(*(store.get(small[index % 20].digest) for index in range(100)))
        assert all(
            read is not None and bytes(read.payload) == bytes(small[index % 20].payload)
            for index, read in enumerate(reads)
        )


def test_the_memory_cache_drops_the_least_recently_used_to_stay_within_its_bytes() -> None:
    entries = [embedding(tiles=1, hidden=64, digest=f"{index:064x}") for index in range(4)]
    cache = LocalEmbeddingCache(3 * entries[0].info.size_bytes)
    for entry in entries[:3]:
        cache.put(entry)
    cache.get(entries[0].digest)
    cache.put(entries[3])
    assert [cache.get(entry.digest) is not None for entry in entries] == [True, False, True, True]
    assert cache.size_bytes == 3 * entries[0].info.size_bytes
    cache.put(entries[3])
    assert cache.size_bytes == 3 * entries[0].info.size_bytes
    cache.put(embedding())
    assert cache.get(DIGEST) is None, "larger than the whole cache"


def test_the_breaker_opens_after_failures_in_a_row_and_lets_one_probe_through_per_pause() -> None:
    now = 0.0
    breaker = CircuitBreaker(threshold=2, pause_s=1.0, clock=lambda: now)
    breaker.record(success=False)
    assert breaker.allow()
    breaker.record(success=False)
    assert breaker.is_open
    assert not breaker.allow()
    now = 1.0
    assert breaker.allow()
    assert not breaker.allow(), "only one probe"
    breaker.record(success=True)
    assert breaker.allow()


async def test_a_service_without_a_store_only_misses() -> None:
    store = NoEmbeddingStore()
    assert not await store.put(embedding(tiles=1, hidden=8))
    assert await store.describe(DIGEST) is None
    assert await store.get(DIGEST) is None
    await store.delete(DIGEST)
