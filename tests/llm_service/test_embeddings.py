"""Embeddings are read from memory, then the store, then the replica that made them; each is fetched once."""

import asyncio

import pytest

from llm_service.embeddings import EmbeddingReader, FetchTier
from llm_service.prompt.dialogue import EmbeddingRef
from shared.embedding import Embedding, EmbeddingInfo
from shared.errors import EmbeddingIncompatible, EmbeddingNotFound
from shared.rpc.deadline import adopt, remaining_s
from shared.store import LocalEmbeddingCache
from tests.llm_service.fakes_llm import ref


def embedding(asked: EmbeddingRef) -> Embedding:
    info = EmbeddingInfo(asked.tile_count, asked.token_count, asked.hidden_size, "float32", 1, 1, 1, 1)
    return Embedding(asked.digest, info, bytearray(info.size_bytes))


class FakeStore:
    """Holds what it is given."""

    def __init__(self, *held: Embedding) -> None:
        self.held = {entry.digest: entry for entry in held}
        self.gate = asyncio.Event()
        self.gate.set()
        self.reads = 0

    async def describe(self, digest: str) -> EmbeddingInfo | None:
        return self.held[digest].info if digest in self.held else None

    async def get(self, digest: str) -> Embedding | None:
        self.reads += 1
        await self.gate.wait()
        return self.held.get(digest)

    async def put(self, embedding: Embedding) -> bool:
        return True

    async def delete(self, digest: str) -> None:
        self.held.pop(digest, None)


class FakeVision:
    """A replica that has what it is given."""

    def __init__(self, *held: Embedding) -> None:
        self.held = {entry.digest: entry for entry in held}

    async def fetch(self, asked: EmbeddingRef) -> Embedding:
        if asked.digest not in self.held:
            raise EmbeddingNotFound("gone", resource=asked.digest)
        return self.held[asked.digest]


def reader(store: FakeStore, vision: FakeVision) -> EmbeddingReader:
    return EmbeddingReader(LocalEmbeddingCache(1 << 20), store, vision)


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
    await asyncio.sleep(0.01)
    tasks[0].cancel()
    await asyncio.sleep(0)
    store.gate.set()
    await asyncio.gather(*tasks[1:])
    assert store.reads == 1
