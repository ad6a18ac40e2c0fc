"""The memory cache keeps what was used last, within its bytes, and forgets what is erased."""

from shared.local_cache import LocalEmbeddingCache
from tests.shared.stored import KEY, Recorder, embedding, key_of

ENTRIES = [embedding(tiles=1, hidden=64, key=key_of(index, media=index)) for index in range(4)]
SIZE = ENTRIES[0].info.size_bytes


def test_the_least_recently_used_go_so_that_the_bytes_suffice() -> None:
    seen = Recorder()
    cache = LocalEmbeddingCache(3 * SIZE, seen)
    for entry in ENTRIES[:3]:
        cache.put(entry)
    cache.get(ENTRIES[0].key)
    cache.put(ENTRIES[3])
    assert [cache.get(entry.key) is not None for entry in ENTRIES] == [True, False, True, True]
    assert cache.size_bytes == 3 * SIZE
    assert seen.evicted == 1
    cache.put(ENTRIES[3])
    assert cache.size_bytes == 3 * SIZE
    cache.put(embedding())
    assert cache.get(KEY) is None, "larger than the whole cache"
    assert seen.evicted == 1


def test_a_tenants_medium_is_erased_and_nothing_else() -> None:
    cache = LocalEmbeddingCache(100 * SIZE)
    others = [
        embedding(tiles=1, hidden=64, key=key_of(1, media=1, tenant="other")),
        embedding(tiles=1, hidden=64, key=key_of(1, media=1, tenant="")),
    ]
    for entry in (*ENTRIES, *others):
        cache.put(entry)
    assert cache.erase("acme", ENTRIES[1].key.media_digest) == 1
    assert cache.get(ENTRIES[1].key) is None
    assert cache.erase("acme") == 3
    assert [cache.get(entry.key) is not None for entry in others] == [True, True]
    cache.clear()
    assert cache.size_bytes == 0
    assert cache.get(others[0].key) is None


def test_what_was_being_fetched_when_something_was_erased_is_not_kept() -> None:
    cache = LocalEmbeddingCache(100 * SIZE)
    for erase in (lambda: cache.erase("acme"), cache.clear):
        epoch = cache.epoch
        erase()
        cache.put(ENTRIES[0], epoch)
        assert cache.get(ENTRIES[0].key) is None
        cache.put(ENTRIES[0], cache.epoch)
        assert cache.get(ENTRIES[0].key) is not None
