"""Bytes of media: verified when they come, chunked in a real store, bounded in memory."""

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from gateway.content import Medium
from gateway.media import MAX_CHUNK_BYTES, LocalMediaCache, MediaLibrary, RedisMediaStore, hash_content
from shared.digest import digest_of
from shared.errors import (
    MediaDigestMismatch,
    MediaNotFound,
    MediaTooLarge,
    MediaUnreadable,
    StoreUnavailable,
)
from tests.gateway.fakes_gateway import CAT, DOG, MemoryMediaStore, redis_of

BIG = random.Random(5).randbytes(2 * MAX_CHUNK_BYTES + 17)


@pytest.fixture
def store(redis: Redis) -> RedisMediaStore:
    return RedisMediaStore(redis, ttl_s=1000)


def library_over(store: RedisMediaStore | MemoryMediaStore, max_bytes: int = 8 << 20) -> MediaLibrary:
    return MediaLibrary(store, LocalMediaCache(0), max_bytes)


async def in_pieces(content: bytes, size: int = 1 << 20) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


def chunk_key(content: bytes, index: int) -> str:
    return f"ivl:media:{digest_of(content)}:{index}"


@pytest.mark.parametrize("size", [1, 100, MAX_CHUNK_BYTES, MAX_CHUNK_BYTES + 1, len(BIG)])
async def test_what_is_stored_comes_back_whole(store: RedisMediaStore, redis: Redis, size: int) -> None:
    content = BIG[:size]
    stored = await store.put(digest_of(content), content)
    assert await store.get(digest_of(content)) == content
    assert stored.size_bytes == size
    lengths = [await redis.strlen(name) for name in await redis.keys("ivl:media:*")]
    assert max(lengths) <= MAX_CHUNK_BYTES


async def test_an_upload_is_held_from_then_on(store: RedisMediaStore) -> None:
    library, digest = library_over(store), digest_of(BIG)
    assert await library.find_missing([digest]) == [digest]
    stored = await library.upload(digest, in_pieces(BIG))
    assert (stored.digest, stored.size_bytes) == (digest, len(BIG))
    assert await library.find_missing([digest]) == []
    assert await library.content_of(Medium(digest)) == BIG


async def test_missing_digests_come_in_the_order_asked(store: RedisMediaStore) -> None:
    await store.put(digest_of(CAT), CAT)
    asked = ["f" * 64, digest_of(CAT), "0" * 64, "f" * 64]
    assert await store.find_missing(asked) == ["f" * 64, "0" * 64, "f" * 64]
    assert await store.find_missing([]) == []


async def test_bytes_that_are_not_what_was_announced_are_not_stored(store: RedisMediaStore, redis: Redis) -> None:
    with pytest.raises(MediaDigestMismatch):
        await library_over(store).upload(digest_of(CAT), in_pieces(DOG))
    assert await redis.keys("*") == []


async def test_an_upload_over_the_limit_is_refused_while_it_comes(store: RedisMediaStore) -> None:
    taken = []

    async def endless() -> AsyncIterator[bytes]:
        while True:
            taken.append(1)
            yield b"x" * 100

    with pytest.raises(MediaTooLarge):
        await library_over(store, max_bytes=1000).upload(digest_of(CAT), endless())
    assert len(taken) == 11


async def test_an_upload_of_nothing_is_refused(store: RedisMediaStore) -> None:
    with pytest.raises(MediaUnreadable):
        await library_over(store).upload(digest_of(b""), in_pieces(b""))


async def test_an_upload_to_a_store_that_is_away_fails() -> None:
    library = library_over(RedisMediaStore(redis_of("redis://127.0.0.1:1"), 1000))
    with pytest.raises(StoreUnavailable):
        await library.upload(digest_of(CAT), in_pieces(CAT))
    with pytest.raises(StoreUnavailable):
        await library.find_missing([digest_of(CAT)])


@pytest.mark.parametrize("damage", [b"", b"x" * 10, BIG[: MAX_CHUNK_BYTES - 1], b"y" * (MAX_CHUNK_BYTES + 1)])
async def test_damaged_bytes_are_a_miss_and_are_forgotten(store: RedisMediaStore, redis: Redis, damage: bytes) -> None:
    await store.put(digest_of(BIG), BIG)
    await redis.set(chunk_key(BIG, 1), damage)
    assert await store.get(digest_of(BIG)) is None
    assert await store.find_missing([digest_of(BIG)]) == [digest_of(BIG)]


async def test_a_lost_chunk_is_a_miss_and_the_rest_is_forgotten(store: RedisMediaStore, redis: Redis) -> None:
    await store.put(digest_of(BIG), BIG)
    await redis.delete(chunk_key(BIG, 2))
    with pytest.raises(MediaNotFound) as caught:
        await library_over(store).content_of(Medium(digest_of(BIG)))
    assert caught.value.resource == digest_of(BIG)
    assert await store.find_missing([digest_of(BIG)]) == [digest_of(BIG)]


@pytest.mark.parametrize("manifest", [b"", b"{}", b'{"size_bytes": 0}', b'{"size_bytes": -5}', b"\xff", b"[]"])
async def test_a_damaged_manifest_is_a_miss(store: RedisMediaStore, redis: Redis, manifest: bytes) -> None:
    await store.put(digest_of(CAT), CAT)
    await redis.set(f"ivl:media:{digest_of(CAT)}", manifest)
    assert await store.get(digest_of(CAT)) is None
    assert await store.find_missing([digest_of(CAT)]) == [digest_of(CAT)]


async def test_use_lengthens_a_life_and_never_shortens_it(store: RedisMediaStore, redis: Redis) -> None:
    await store.put(digest_of(BIG), BIG)
    names = await redis.keys("ivl:media:*")
    for name in names:
        await redis.expire(name, 5)
    await store.find_missing([digest_of(BIG)])
    assert all([await redis.ttl(name) > 900 for name in names])
    await store.touch([digest_of(BIG)], ttl_s=5000)
    await store.get(digest_of(BIG))
    assert all([await redis.ttl(name) > 4000 for name in names])


async def test_what_a_conversation_needs_is_kept_as_long_as_the_conversation(
    store: RedisMediaStore, redis: Redis
) -> None:
    library = library_over(store)
    await store.put(digest_of(DOG), DOG)
    await library.keep([Medium(digest_of(CAT), content=CAT), Medium(digest_of(DOG)), Medium("e" * 64)], ttl_s=9000)
    assert await library.content_of(Medium(digest_of(CAT))) == CAT
    for content in (CAT, DOG):
        assert await redis.ttl(chunk_key(content, 0)) > 8000


async def test_keeping_media_in_a_store_that_is_away_fails_quietly() -> None:
    store = MemoryMediaStore()
    store.away = True
    await library_over(store).keep([Medium(digest_of(CAT), content=CAT)], 10)


async def test_a_store_that_stays_away_is_not_asked_again_at_once() -> None:
    store, asked = MemoryMediaStore(), []

    class Counting(MemoryMediaStore):
        async def touch(self, digests: object, ttl_s: int | None = None) -> None:
            asked.append(digests)
            raise StoreUnavailable("Away.")

    library = library_over(Counting())
    for _ in range(10):
        await library.note_use([Medium("a" * 64)])
    assert len(asked) == 3
    await library_over(store).note_use([Medium("a" * 64)])
    assert store.touched == ["a" * 64]


async def test_memory_drops_what_was_used_longest_ago() -> None:
    cache = LocalMediaCache(10)
    cache.put("a", b"12345")
    cache.put("b", b"1234")
    cache.get("a")
    cache.put("c", b"1234")
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (b"12345", None, b"1234")
    assert cache.size_bytes == 9


async def test_memory_does_not_hold_what_is_larger_than_itself() -> None:
    cache = LocalMediaCache(4)
    cache.put("a", b"1234")
    cache.put("b", b"12345")
    assert (cache.get("a"), cache.get("b"), cache.size_bytes) == (b"1234", None, 4)
    cache.put("a", b"12345")
    assert (cache.get("a"), cache.size_bytes) == (None, 0)


async def test_large_content_is_hashed_beside_the_loop() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    assert await hash_content(BIG) == digest_of(BIG)
    counting.cancel()
    assert turns > 0
