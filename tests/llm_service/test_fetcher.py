"""An answer's embeddings are counted from before they come until the engine has no use for them any more."""

import asyncio

import pytest
import torch

from llm_service.admission import Admission
from llm_service.embeddings import EmbeddingReader, FetchTier
from llm_service.fetcher import EmbeddingFetcher
from llm_service.metrics import UNOBSERVED
from llm_service.prompt.dialogue import EmbeddingRef
from llm_service.prompt.splice import PlaceholderRange, PromptTokens
from shared.digest import digest_of
from shared.embedding import Embedding, EmbeddingInfo
from shared.errors import EmbeddingNotFound
from shared.local_cache import LocalEmbeddingCache
from shared.store import NoEmbeddingStore
from shared.tensors import bytes_of
from tests.llm_service.fakes_llm import ref

CAT, DOG = (ref(digest_of(name), tiles=2) for name in (b"cat", b"dog"))
ROW_BYTES = 64 * 4


class FakeVision:
    """Streams embeddings whose rows are numbered; fails for what is `gone`."""

    def __init__(self) -> None:
        self.fetched: list[EmbeddingRef] = []
        self.gone: set[str] = set()

    async def fetch(self, ref: EmbeddingRef) -> Embedding:
        self.fetched.append(ref)
        if ref.digest in self.gone:
            raise EmbeddingNotFound("gone")
        rows = torch.arange(ref.token_count, dtype=torch.float32)[:, None].expand(-1, ref.hidden_size)
        info = EmbeddingInfo(ref.tile_count, ref.token_count, ref.hidden_size, "float32", 1, 1, 1, 1)
        return Embedding(ref.key, info, bytes_of(rows.contiguous()))


def fetcher_of(vision: FakeVision, admission: Admission, *places: PlaceholderRange) -> EmbeddingFetcher:
    reader = EmbeddingReader(LocalEmbeddingCache(0), NoEmbeddingStore(), vision)
    return EmbeddingFetcher(PromptTokens((0,) * 40, places), reader, admission, torch.float32, UNOBSERVED)


async def is_free(admission: Admission, size_bytes: int) -> bool:
    """Whether so many bytes can be had at once."""
    try:
        async with asyncio.timeout(0.01), admission.embeddings(size_bytes):
            return True
    except TimeoutError:
        return False


async def test_each_placeholder_gets_its_rows_and_an_embedding_is_read_once() -> None:
    vision = FakeVision()
    places = PlaceholderRange(0, 4, CAT), PlaceholderRange(6, 4, CAT, 4), PlaceholderRange(12, 8, DOG)
    fetcher = fetcher_of(vision, Admission(8, 1 << 20), *places)
    rows = await fetcher.fetch((0, 1))
    assert {index: tensor[:, 0].tolist() for index, tensor in rows.items()} == {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}
    assert vision.fetched == [CAT]
    assert [(each.digest, each.tier) for each in fetcher.transfers] == [
        (CAT.digest, FetchTier.VISION),
        (DOG.digest, FetchTier.PREFIX),
    ]


async def test_bytes_are_held_until_they_are_released() -> None:
    admission = Admission(8, 16 * ROW_BYTES)
    fetcher = fetcher_of(FakeVision(), admission, PlaceholderRange(0, 8, CAT), PlaceholderRange(8, 8, DOG))
    await fetcher.fetch((0,))
    assert await is_free(admission, 8 * ROW_BYTES)
    assert not await is_free(admission, 9 * ROW_BYTES)
    await fetcher.fetch((0, 1))
    assert not await is_free(admission, 1), "what was held before was given up, not added"
    await fetcher.release()
    assert await is_free(admission, 16 * ROW_BYTES)
    await fetcher.release()


async def test_a_fetch_that_fails_is_counted_until_it_is_released() -> None:
    admission, vision = Admission(8, 8 * ROW_BYTES), FakeVision()
    vision.gone = {CAT.digest}
    fetcher = fetcher_of(vision, admission, PlaceholderRange(0, 8, CAT))
    with pytest.raises(EmbeddingNotFound):
        await fetcher.fetch((0,))
    await fetcher.release()
    assert await is_free(admission, 8 * ROW_BYTES)


async def test_what_is_fetched_again_is_reported_as_it_came_first() -> None:
    vision = FakeVision()
    reader = EmbeddingReader(LocalEmbeddingCache(1 << 20), NoEmbeddingStore(), vision)
    prompt = PromptTokens((0,) * 8, (PlaceholderRange(0, 8, CAT),))
    fetcher = EmbeddingFetcher(prompt, reader, Admission(8, 1 << 20), torch.float32, UNOBSERVED)
    for _ in range(2):
        await fetcher.fetch((0,))
    assert [each.tier for each in fetcher.transfers] == [FetchTier.VISION]
    assert vision.fetched == [CAT]
