"""The embedding store over a real server: what is stored comes back verified, and its absence is only ever a miss."""

import asyncio
import random
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from blake3 import blake3
from pydantic import SecretStr
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
async def opened(
    valkey: Valkey, key: str = "k", timeout_s: float = 0.25
) -> AsyncIterator[tuple[RedisEmbeddingStore, Redis]]:
    redis = connect_redis(valkey.url, timeout_s)
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
    async with opened(valkey, timeout_s=3.0) as (store, _):
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


@asynccontextmanager
async def slow_link(port: int, bytes_per_s: float) -> AsyncIterator[str]:
    """Yield the URL of a server behind a link that all its connections share."""
    next_free = 0.0

    async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        nonlocal next_free
        loop = asyncio.get_running_loop()
        try:
            while data := await source.read(64 << 10):
                next_free = max(next_free, loop.time()) + len(data) / bytes_per_s
                await asyncio.sleep(next_free - loop.time())
                target.write(data)
                await target.drain()
        except OSError:
            pass
        finally:
            target.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward = await asyncio.open_connection("127.0.0.1", port, limit=64 << 10)
        await asyncio.gather(pump(reader, onward[1]), pump(onward[0], writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=64 << 10)
    async with server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_the_timeout_bounds_one_value_and_not_a_whole_embedding(valkey: Valkey) -> None:
    large = embedding(tiles=13, hidden=3584)  # 24 MB: 1.2 s on this link, and 0.2 s for two values
    async with slow_link(valkey.port, 20e6) as url:
        redis = connect_redis(SecretStr(url), 0.8)
        store = RedisEmbeddingStore(redis, EmbeddingFormat("k"), 60, CircuitBreaker())
        assert await store.put(large)
        read = await store.get(DIGEST)
        assert read is not None
        assert bytes(read.payload) == bytes(large.payload)
        await redis.aclose()


async def test_many_large_embeddings_at_once_take_turns_and_are_all_read(valkey: Valkey) -> None:
    large = [embedding(tiles=4, hidden=3584, digest=f"{index:064x}") for index in range(12)]
    async with opened(valkey, timeout_s=3.0) as (store, _):
        assert all(await asyncio.gather(*map(store.put, large)))
        reads = await asyncio.gather(*(store.get(large[index % 12].digest) for index in range(48)))
        assert all(read is not None for read in reads)


async def test_a_server_that_refuses_lives_so_the_breaker_stays_closed(valkey: Valkey) -> None:
    async with opened(valkey) as (store, redis):
        await store.put(embedding())
        for index in range(5):
            await redis.lpush(f"ivl:embedding:{index:064x}", "x")
            assert await store.get(f"{index:064x}") is None
        await redis.config_set("maxmemory", "1")
        for _ in range(5):
            assert not await store.put(embedding(digest="cd" * 32))
        assert await store.get(DIGEST) is not None, "neither WRONGTYPE nor OOM has opened the breaker"


async def test_a_server_that_lets_nobody_in_opens_the_breaker(valkey: Valkey) -> None:
    async with opened(valkey) as (_, admin):
        await admin.config_set("requirepass", "secret")
        redis = connect_redis(SecretStr(valkey.url.replace("//", "//:wrong@")), 0.25)
        breaker = CircuitBreaker()
        store = RedisEmbeddingStore(redis, EmbeddingFormat("k"), 60, breaker)
        for _ in range(3):
            assert await store.get(DIGEST) is None
        assert breaker.is_open
        await redis.aclose()


async def test_forged_values_with_a_fitting_mac_are_misses_and_are_forgotten(valkey: Valkey) -> None:
    async with opened(valkey, key="") as (store, redis):
        of = embedding().info
        for name, value in {
            "64 TiB": (1 << 24, 1 << 22, 0),
            "1 TiB": (1 << 22, 1 << 16, 0),
            "type 9": (1, 1, 9),
        }.items():
            await redis.set(f"ivl:embedding:{DIGEST}", forged_manifest(*value))
            assert await store.describe(DIGEST) is None, name
            assert not await redis.exists(f"ivl:embedding:{DIGEST}"), name
        await store.put(embedding())
        await redis.set(f"ivl:embedding:{DIGEST}:1", EmbeddingFormat("").pack(embedding())[1][0])
        assert await store.get(DIGEST) is None, "a group in another's place"
        assert not await redis.exists(f"ivl:embedding:{DIGEST}")
        assert of.plausible()


def forged_manifest(tokens: int, hidden: int, data_type: int) -> bytes:
    """Return a manifest as anybody can make it where there is no key."""
    manifest, _ = EmbeddingFormat("").pack(embedding(tiles=1, hidden=8))
    numbers = struct.pack("<III", 1, tokens, hidden)
    fields = manifest[:6] + bytes([data_type]) + manifest[7:8] + numbers + manifest[20:76]
    key = blake3(b"", derive_key_context="internvl-serving embedding values v1").digest()
    return fields + blake3(fields, key=key).digest()


async def test_what_cannot_be_stored_is_refused_quietly(valkey: Valkey) -> None:
    huge = Embedding(DIGEST, EmbeddingInfo(5000, 5000, 1, "float32", 1, 1, 1, 1), bytes(20_000))
    async with opened(valkey) as (store, redis):
        assert not await store.put(huge)
        assert not await redis.keys()


async def test_a_put_that_fails_on_the_way_leaves_no_manifest(valkey: Valkey) -> None:
    async with opened(valkey) as (store, redis):
        await redis.config_set("maxmemory", "6mb")
        assert not await store.put(embedding(tiles=13, hidden=3584))
        await redis.config_set("maxmemory", "0")
        assert not await redis.exists(f"ivl:embedding:{DIGEST}")
        assert await store.describe(DIGEST) is None


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense\r\n",
        b"-\xff\xfe\r\n",
        b":7\r\n",
        b"*1\r\n$1\r\nx\r\n",
        b"$99999999999\r\nx",
        b"+OK\r\n",
        b"$1\r\nx\r\n",
        b"",
    ],
)
async def test_whatever_a_server_answers_is_a_miss(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(64 << 10) and answer:
            writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        redis = connect_redis(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}", 0.1)
        store = RedisEmbeddingStore(redis, EmbeddingFormat("k"), 60, CircuitBreaker(threshold=100))
        assert await store.describe(DIGEST) is None
        assert await store.get(DIGEST) is None
        await store.put(embedding(tiles=1, hidden=8))
        await store.delete(DIGEST)
        await redis.aclose()
