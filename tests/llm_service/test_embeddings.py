"""Embeddings are read from memory, then the store, then the replica that made them; each is fetched once."""

import asyncio
import math
from dataclasses import replace

import pytest

from llm_service.embeddings import EmbeddingReader, FetchTier, Hedge
from llm_service.prompt.dialogue import EmbeddingRef
from shared.embedding import Embedding, EmbeddingInfo, EmbeddingKey
from shared.errors import EmbeddingIncompatible, EmbeddingNotFound
from shared.local_cache import LocalEmbeddingCache
from shared.patience import Patience
from shared.rpc.deadline import adopt, remaining_s
from shared.write_queue import settled
from tests.llm_service.fakes_llm import ref

NEVER, AT_ONCE = Hedge(answer_s=math.inf), Hedge(answer_s=0.0, linger_s=0.0)


def embedding(asked: EmbeddingRef) -> Embedding:
    info = EmbeddingInfo(asked.tile_count, asked.token_count, asked.hidden_size, "float32", 1, 1, 1, 1)
    return Embedding(asked.key, info, bytearray(info.size_bytes))


class FakeStore:
    """Holds what it is given."""

    def __init__(self, *held: Embedding) -> None:
        self.held = {entry.key: entry for entry in held}
        self.gate = asyncio.Event()
        self.gate.set()
        self.reads = self.abandoned = 0

    async def describe(self, key: EmbeddingKey, patience: Patience) -> EmbeddingInfo | None:
        return self.held[key].info if key in self.held else None

    async def get(self, key: EmbeddingKey) -> Embedding | None:
        self.reads += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.abandoned += 1
            raise
        return self.held.get(key)

    def put(self, embedding: Embedding) -> asyncio.Future[bool]:
        return settled(written=True)

    async def erase(self, tenant: str, media_digest: str | None) -> int:
        return 0

    async def delete(self, key: EmbeddingKey) -> None:
        self.held.pop(key, None)


class FakeVision:
    """A replica that has what it is given."""

    def __init__(self, *held: Embedding) -> None:
        self.held = {entry.key: entry for entry in held}
        self.asked, self.gate = asyncio.Event(), asyncio.Event()
        self.gate.set()
        self.fetches = self.abandoned = 0

    async def fetch(self, asked: EmbeddingRef) -> Embedding:
        self.fetches += 1
        self.asked.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.abandoned += 1
            raise
        if asked.key not in self.held:
            raise EmbeddingNotFound("gone", resource=asked.digest)
        return self.held[asked.key]


def reader(store: FakeStore, vision: FakeVision, hedge: Hedge = NEVER) -> EmbeddingReader:
    return EmbeddingReader(LocalEmbeddingCache(1 << 20), store, vision, hedge)


async def test_the_store_comes_before_vision_and_memory_before_the_store() -> None:
    chosen = reader(FakeStore(embedding(ref())), FakeVision())
    assert (await chosen.read(ref())).tier is FetchTier.STORE
    assert (await chosen.read(ref())).tier is FetchTier.LOCAL


async def test_what_the_store_has_lost_comes_from_vision() -> None:
    assert (await reader(FakeStore(), FakeVision(embedding(ref()))).read(ref())).tier is FetchTier.VISION


async def test_what_nobody_has_is_not_found_by_its_digest() -> None:
    with pytest.raises(EmbeddingNotFound) as missing:
        await reader(FakeStore(), FakeVision()).read(ref())
    assert missing.value.resource == ref().digest


async def test_an_embedding_of_another_shape_is_refused() -> None:
    with pytest.raises(EmbeddingIncompatible):
        await reader(FakeStore(embedding(ref(tiles=2))), FakeVision()).read(ref())


async def test_the_deadline_of_the_first_reader_does_not_end_the_fetch_of_the_others() -> None:
    seen: list[float | None] = []

    class WatchedVision(FakeVision):
        async def fetch(self, asked: EmbeddingRef) -> Embedding:
            seen.append(remaining_s())
            return await super().fetch(asked)

    chosen = reader(FakeStore(), WatchedVision(embedding(ref())))

    async def hurried() -> None:
        adopt(0.001, "hurried")
        await chosen.read(ref())

    await asyncio.create_task(hurried())
    assert seen == [None]


async def test_a_reference_that_lies_about_the_shape_harms_no_other() -> None:
    chosen = reader(FakeStore(embedding(ref())), FakeVision())
    lie = ref(tiles=2)
    results = await asyncio.gather(chosen.read(lie), chosen.read(ref()), return_exceptions=True)
    assert isinstance(results[0], EmbeddingIncompatible)
    assert not isinstance(results[1], BaseException)


async def test_readers_at_the_same_time_share_one_fetch_which_nobodys_cancellation_ends() -> None:
    store = FakeStore(embedding(ref()))
    store.gate.clear()
    chosen = reader(store, FakeVision())
    tasks = [asyncio.create_task(chosen.read(ref())) for _ in range(10)]
    while not store.reads:
        await asyncio.sleep(0)
    tasks[0].cancel()
    await asyncio.sleep(0)
    store.gate.set()
    await asyncio.gather(*tasks[1:])
    assert store.reads == 1


async def test_a_store_that_does_not_answer_in_time_is_overtaken_by_vision_and_left() -> None:
    store, vision = FakeStore(embedding(ref())), FakeVision(embedding(ref()))
    store.gate.clear()
    assert (await reader(store, vision, AT_ONCE).read(ref())).tier is FetchTier.VISION
    while not store.abandoned:
        await asyncio.sleep(0)


async def test_a_store_that_is_away_fails_by_itself_so_that_later_requests_do_not_wait_for_it() -> None:
    failed = asyncio.Event()

    class AwayStore(FakeStore):
        async def get(self, key: EmbeddingKey) -> Embedding | None:
            await self.gate.wait()
            failed.set()
            return None

    store, vision = AwayStore(), FakeVision(embedding(ref()))
    store.gate.clear()
    patient = Hedge(answer_s=0.0, linger_s=60.0)
    assert (await reader(store, vision, patient).read(ref())).tier is FetchTier.VISION
    store.gate.set()
    await failed.wait()


async def test_a_store_that_answers_in_time_leaves_vision_alone() -> None:
    store, vision = FakeStore(embedding(ref())), FakeVision(embedding(ref()))
    assert (await reader(store, vision).read(ref())).tier is FetchTier.STORE
    assert vision.fetches == 0


async def test_a_late_answer_of_the_store_overtakes_vision_which_is_left() -> None:
    store, vision = FakeStore(embedding(ref())), FakeVision(embedding(ref()))
    store.gate.clear()
    vision.gate.clear()
    reading = asyncio.create_task(reader(store, vision, AT_ONCE).read(ref()))
    await vision.asked.wait()
    store.gate.set()
    assert (await reading).tier is FetchTier.STORE
    assert vision.abandoned == 1


async def test_where_vision_has_lost_it_a_late_answer_of_the_store_still_counts() -> None:
    store, vision = FakeStore(embedding(ref())), FakeVision()
    store.gate.clear()
    reading = asyncio.create_task(reader(store, vision, AT_ONCE).read(ref()))
    await vision.asked.wait()
    store.gate.set()
    assert (await reading).tier is FetchTier.STORE


async def test_a_late_miss_of_the_store_leaves_vision_to_answer() -> None:
    store, vision = FakeStore(), FakeVision(embedding(ref()))
    store.gate.clear()
    vision.gate.clear()
    reading = asyncio.create_task(reader(store, vision, AT_ONCE).read(ref()))
    await vision.asked.wait()
    store.gate.set()
    await asyncio.sleep(0)
    vision.gate.set()
    assert (await reading).tier is FetchTier.VISION


async def test_what_neither_has_is_not_found_however_late_they_say_so() -> None:
    store, vision = FakeStore(), FakeVision()
    store.gate.clear()
    reading = asyncio.create_task(reader(store, vision, AT_ONCE).read(ref()))
    await vision.asked.wait()
    store.gate.set()
    with pytest.raises(EmbeddingNotFound):
        await reading


async def test_what_was_erased_while_it_was_read_is_not_kept_in_memory() -> None:
    store = FakeStore(embedding(ref()))
    store.gate.clear()
    cache = LocalEmbeddingCache(1 << 20)
    chosen = EmbeddingReader(cache, store, FakeVision(), NEVER)
    reading = asyncio.create_task(chosen.read(ref()))
    while not store.reads:
        await asyncio.sleep(0)
    cache.erase("", ref().media_digest)
    store.gate.set()
    assert (await reading).tier is FetchTier.STORE
    assert cache.get(ref().key) is None


async def test_tenants_do_not_share_what_is_in_memory() -> None:
    mine = replace(ref(), tenant="acme")
    store = FakeStore(embedding(mine))
    chosen = reader(store, FakeVision())
    await chosen.read(mine)
    with pytest.raises(EmbeddingNotFound):
        await chosen.read(replace(mine, tenant="other"))


async def test_references_that_differ_in_their_handle_only_share_one_fetch() -> None:
    store = FakeStore(embedding(ref()))
    chosen = reader(store, FakeVision())
    await asyncio.gather(*(chosen.read(replace(ref(), handle=handle)) for handle in (b"a", b"b")))
    assert store.reads == 1
