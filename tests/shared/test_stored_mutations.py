"""Whatever becomes of stored values, no embedding but the right one is ever read: 200 changes, each of them a miss."""

import random
import struct
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from shared.embedding import Embedding, EmbeddingInfo, EmbeddingKey
from shared.embedding_values import EmbeddingFormat
from shared.patience import Patience
from tests.shared.stored import DIGEST, MEDIA, store_over
from tests.valkey import Valkey, running_valkey

SEEDS = 200
TARGET = EmbeddingKey(DIGEST, MEDIA, "acme")
# Of the same shape, so that nothing but their identity tells them from the target.
OTHERS = (
    EmbeddingKey("ef" * 32, MEDIA, "acme"),
    EmbeddingKey(DIGEST, "01" * 32, "acme"),
    EmbeddingKey(DIGEST, MEDIA, "other"),
    EmbeddingKey(DIGEST, MEDIA, ""),
)
INFO = EmbeddingInfo(6, 6 * 16, 16_384, "float32", 640, 480, 3, 2)  # 1 MiB a tile, three groups
SHAPES = (
    EmbeddingInfo(6, 6 * 16, 16_384, "float32", 480, 640, 3, 2),  # width and height
    EmbeddingInfo(6, 6 * 16, 16_384, "float32", 640, 480, 2, 3),  # columns and rows
    EmbeddingInfo(6, 16_386, 96, "float32", 640, 480, 3, 2),  # tokens and their width, as near as tiles let them be
    EmbeddingInfo(6, 6 * 32, 16_384, "float16", 640, 480, 3, 2),
    EmbeddingInfo(3, 6 * 16, 16_384, "float32", 640, 480, 3, 1),
)


def made(key: EmbeddingKey, info: EmbeddingInfo = INFO) -> Embedding:
    return Embedding(key, info, random.Random(repr((key, info))).randbytes(info.size_bytes))


def keys_of(key: EmbeddingKey, info: EmbeddingInfo = INFO) -> list[bytes]:
    """Return the keys of all values, the manifest's first."""
    return [key.name.manifest_key, *map(key.name.group_key, range(info.group_count))]


async def flip(redis: Redis, rng: random.Random) -> None:
    key = rng.choice(keys_of(TARGET))
    value = bytearray(await redis.get(key))
    # In the header as often as in the rows.
    place = rng.randrange(min(len(value), 188)) if rng.random() < 0.5 else rng.randrange(len(value))
    value[place] ^= 1 << rng.randrange(8)
    await redis.set(key, bytes(value))


async def cut(redis: Redis, rng: random.Random) -> None:
    key = rng.choice(keys_of(TARGET))
    value = await redis.get(key)
    length = rng.choice([0, 1, 8, 187, 188, len(value) - 1, len(value) - 4, rng.randrange(len(value))])
    await redis.set(key, value[: min(length, len(value) - 1)])


async def extend(redis: Redis, rng: random.Random) -> None:
    await redis.append(rng.choice(keys_of(TARGET)).decode(), rng.randbytes(rng.choice([1, 4, 16, 65_536])))


async def replace(redis: Redis, rng: random.Random) -> None:
    key = rng.choice(keys_of(TARGET))
    length = len(await redis.get(key))
    await redis.set(key, rng.choice([rng.randbytes(length), bytes(length), b"\x80\x04\x95" + rng.randbytes(length)]))


async def swap_groups(redis: Redis, rng: random.Random) -> None:
    first, second = rng.sample(keys_of(TARGET), 2)
    one, other = await redis.mget([first, second])
    await redis.mset({first: other, second: one})


async def swap_keys(redis: Redis, rng: random.Random) -> None:
    """One value, or all of them, from another embedding: of another digest, medium or tenant."""
    pairs = list(zip(keys_of(TARGET), keys_of(rng.choice(OTHERS)), strict=True))
    for mine, theirs in pairs if rng.random() < 0.5 else rng.sample(pairs, 1):
        await redis.set(mine, await redis.get(theirs))


async def reshape(redis: Redis, rng: random.Random) -> None:
    """Values that are sealed well and say another shape, beside those that say the right one."""
    info = rng.choice(SHAPES)
    sealer, name, payload = EmbeddingFormat("k"), TARGET.name, made(TARGET).payload
    if rng.random() < 0.5:
        await redis.set(name.manifest_key, sealer.manifest(name, info))
        return
    index = rng.randrange(min(info.group_count, INFO.group_count))
    rows = bytes(payload[info.group_slice(index)])
    await redis.set(name.group_key(index), sealer.group_header(name, info, index, rows) + rows)


async def rewrite_field(redis: Redis, rng: random.Random) -> None:
    """A number of the header, transposed with another or set to something extreme."""
    key = rng.choice(keys_of(TARGET))
    value = bytearray(await redis.get(key))
    first, second = (8 + 4 * index for index in rng.sample(range(10), 2))
    if rng.random() < 0.5 and value[first : first + 4] != value[second : second + 4]:
        value[first : first + 4], value[second : second + 4] = value[second : second + 4], value[first : first + 4]
    else:
        struct.pack_into("<I", value, first, rng.choice([7, 1 << 20, 1 << 31, 0xFFFFFFFE]))
    await redis.set(key, bytes(value))


async def foreign(redis: Redis, rng: random.Random) -> None:
    """The same embedding, sealed with another secret."""
    sealer, name, payload = EmbeddingFormat("another secret"), TARGET.name, made(TARGET).payload
    index = rng.randrange(-1, INFO.group_count)
    rows = bytes(payload[INFO.group_slice(index)])
    header = sealer.manifest(name, INFO) if index < 0 else sealer.group_header(name, INFO, index, rows) + rows
    await redis.set(name.manifest_key if index < 0 else name.group_key(index), header)


MUTATIONS = (flip, cut, extend, replace, swap_groups, swap_keys, reshape, rewrite_field, foreign)


@pytest.fixture
async def valkey() -> AsyncIterator[Valkey]:
    async with running_valkey() as server:
        yield server


async def test_two_hundred_changes_are_two_hundred_misses_and_are_deleted(valkey: Valkey) -> None:
    async with store_over(valkey.url) as (store, link):
        for key in (TARGET, *OTHERS):
            assert await store.put(made(key))
            for stored in keys_of(key):
                await link.redis.copy(stored.decode(), f"pristine:{stored.decode()}")
        for seed in range(SEEDS):
            rng = random.Random(seed)
            mutate = MUTATIONS[seed % len(MUTATIONS)]
            await mutate(link.redis, rng)
            assert await store.get(TARGET) is None, f"{mutate.__name__} with seed {seed}"
            assert not await link.redis.exists(TARGET.name.manifest_key), f"{mutate.__name__} with seed {seed}"
            assert await store.describe(TARGET, Patience(60)) is None
            for stored in keys_of(TARGET):
                await link.redis.copy(f"pristine:{stored.decode()}", stored.decode(), replace=True)
        read = await store.get(TARGET)
        assert read is not None
        assert bytes(read.payload) == made(TARGET).payload
        assert not link.breaker.is_open
