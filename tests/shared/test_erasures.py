"""Erased embeddings are gone from the store and from the memory of every process that listens."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from shared.erasures import CHANNEL, Erasures, heeding_erasures
from shared.errors import StoreUnavailable
from shared.local_cache import LocalEmbeddingCache
from shared.stored_name import tenant_tag_of
from tests.shared.stored import KEY, embedding, key_of, store_over
from tests.valkey import Valkey, running_valkey


@pytest.fixture
async def valkey() -> AsyncIterator[Valkey]:
    async with running_valkey() as server:
        yield server


class WatchedCache(LocalEmbeddingCache):
    """A cache that lets a test wait for what is done to it."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.cleared, self.erased = asyncio.Event(), asyncio.Event()

    def clear(self) -> None:
        super().clear()
        self.cleared.set()

    def erase_tagged(self, tenant_tag: str, media_digest: str | None) -> int:
        self.erased.set()
        return super().erase_tagged(tenant_tag, media_digest)


async def test_a_medium_of_a_tenant_is_removed_with_all_its_values_and_counted(valkey: Valkey) -> None:
    async with store_over(valkey.url) as (store, link):
        keys = [key_of(1, 1), key_of(2, 1), key_of(3, 2), key_of(1, 1, "other"), key_of(1, 1, "")]
        for key in keys:
            assert await store.put(embedding(tiles=4, hidden=3584 if key == keys[0] else 8, key=key))
        assert await store.erase("acme", keys[0].media_digest) == 2
        assert [await store.get(key) is not None for key in keys] == [False, False, True, True, True]
        left = [key.decode() for key in await link.redis.keys()]
        prefix = f"ivl:embedding:{tenant_tag_of('acme')}:{keys[0].media_digest}"
        assert not [key for key in left if key.startswith(prefix)]
        assert await store.erase("acme", None) == 1
        assert await store.erase("acme", None) == 0
        assert [await store.get(key) is not None for key in keys] == [False, False, False, True, True]


async def test_thousands_of_values_are_removed_in_portions(valkey: Valkey) -> None:
    async with store_over(valkey.url) as (store, link):
        names = [key_of(index, 1).name for index in range(1200)]
        await link.redis.mset({key: b"x" for name in names for key in (name.manifest_key, name.group_key(0))})
        await link.redis.mset({key_of(index, 1, "other").name.manifest_key: b"x" for index in range(1200)})
        assert await store.erase("acme", None) == 1200
        assert await link.redis.dbsize() == 1200


async def test_erasing_what_cannot_be_reached_raises(valkey: Valkey) -> None:
    async with store_over(valkey.url) as (store, _):
        valkey.kill()
        with pytest.raises(StoreUnavailable):
            await store.erase("acme", None)


async def test_what_is_queued_when_its_medium_is_erased_does_not_come_back(valkey: Valkey) -> None:
    async with store_over(valkey.url) as (store, link):
        writes = [store.put(embedding(tiles=8, hidden=3584, key=key_of(index))) for index in range(3)]
        await store.erase("acme", None)
        assert await asyncio.gather(*writes) == [False] * 3
        assert await link.redis.dbsize() == 0


async def test_every_process_that_listens_forgets(valkey: Valkey) -> None:
    caches = [WatchedCache(), WatchedCache()]
    async with AsyncExitStack() as stack:
        store, link = await stack.enter_async_context(store_over(valkey.url))
        for cache in caches:
            await stack.enter_async_context(heeding_erasures(link, cache))
            await cache.cleared.wait()
            cache.put(embedding(tiles=1, hidden=8))
            cache.put(embedding(tiles=1, hidden=8, key=key_of(1, tenant="other")))
        await store.erase(KEY.tenant, KEY.media_digest)
        for cache in caches:
            await cache.erased.wait()
            assert cache.get(KEY) is None
            assert cache.get(key_of(1, tenant="other")) is not None


async def test_whoever_may_have_missed_an_erasure_forgets_everything(valkey: Valkey) -> None:
    cache = WatchedCache()
    async with store_over(valkey.url) as (_, link), heeding_erasures(link, cache):
        await cache.cleared.wait()
        cache.cleared.clear()
        cache.put(embedding(tiles=1, hidden=8))
        await link.redis.client_kill_filter(_type="pubsub")
        await cache.cleared.wait()
        assert cache.get(KEY) is None


@pytest.mark.parametrize("message", [b"", b"\xff", b"[]", b"7", b"null", b"{}", b'{"tenant_tag": "x"}'])
def test_an_erasure_that_cannot_be_read_is_one_of_everything(message: bytes) -> None:
    cache = LocalEmbeddingCache(1 << 20)
    cache.put(embedding(tiles=1, hidden=8))
    Erasures(cache).hear(message)
    assert cache.get(KEY) is None


def test_what_is_announced_is_all_that_is_forgotten() -> None:
    cache, queue = LocalEmbeddingCache(1 << 20), LocalEmbeddingCache(1 << 20)
    kept = embedding(tiles=1, hidden=8, key=key_of(1))
    for memory in (cache, queue):
        memory.put(kept)
        memory.put(embedding(tiles=1, hidden=8))
    message = {"tenant_tag": tenant_tag_of(KEY.tenant), "media_digest": KEY.media_digest}
    Erasures(cache, queue).hear(json.dumps(message).encode())
    for memory in (cache, queue):
        assert memory.get(KEY) is None
        assert memory.get(kept.key) is not None
    Erasures(cache).hear(json.dumps(message | {"media_digest": None}).encode())
    assert cache.get(kept.key) is None
    assert CHANNEL == "ivl:erased"
