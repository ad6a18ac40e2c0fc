"""Brings the embeddings that an answer needs into memory, and counts their bytes for as long as they are there."""

import asyncio
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

import torch

from llm_service.admission import Admission
from llm_service.embeddings import EmbeddingReader, FetchTier
from llm_service.metrics import LlmMetrics
from llm_service.prompt.dialogue import EmbeddingRef
from llm_service.prompt.splice import PlaceholderRange, PromptTokens
from shared import tracing
from shared.embedding import Embedding
from shared.passing_thread import in_passing_thread
from shared.tensors import tensor_of

_INLINE_BYTES: Final = 256 << 10  # of an embedding that is converted on the event loop; larger ones go to a thread


@dataclass(frozen=True, slots=True)
class Transfer:
    """How an embedding reached the engine, how long that took, and how many bytes were read for it."""

    digest: str
    tier: FetchTier
    duration_s: float
    size_bytes: int = 0


class EmbeddingFetcher:
    """The embeddings of one prompt. One event loop only."""

    def __init__(
        self,
        prompt: PromptTokens,
        reader: EmbeddingReader,
        admission: Admission,
        dtype: torch.dtype,
        metrics: LlmMetrics,
    ) -> None:
        self._places = prompt.placeholders
        self._reader = reader
        self._admission = admission
        self._dtype = dtype
        self._metrics = metrics
        self._held = AsyncExitStack()
        self._transfers: dict[EmbeddingRef, Transfer] = {}

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        """How each embedding came at first, in the order of the prompt."""
        refs = dict.fromkeys(place.ref for place in self._places)
        return tuple(self._transfers.get(ref) or Transfer(ref.digest, FetchTier.PREFIX, 0.0) for ref in refs)

    async def fetch(self, indices: tuple[int, ...]) -> Mapping[int, torch.Tensor]:
        """Return the rows of these placeholders, [length, hidden]; those of one embedding share its memory.

        Waits until there is room for the embeddings; what was fetched before is given up. Raises what the reader does.
        """
        await self.release()
        places = {index: self._places[index] for index in indices}
        refs = list(dict.fromkeys(place.ref for place in places.values()))
        await self._held.enter_async_context(self._admission.embeddings(sum(map(self._size_bytes, refs))))
        fetched = await asyncio.gather(*map(self._reader.read, refs))
        self._metrics.note_fetched(fetched)
        fetched_at = time.monotonic()
        for entry in fetched:
            facts = {"internvl.cache_tier": entry.tier.value, "internvl.bytes": entry.embedding.info.size_bytes}
            tracing.record("fetch embedding", fetched_at - entry.duration_s, fetched_at, facts)
        whole = {ref: await self._tensor(entry.embedding) for ref, entry in zip(refs, fetched, strict=True)}
        for ref, entry in zip(refs, fetched, strict=True):
            size_bytes = entry.embedding.info.size_bytes
            self._transfers.setdefault(ref, Transfer(ref.digest, entry.tier, entry.duration_s, size_bytes))
        return {index: _rows(whole[place.ref], place) for index, place in places.items()}

    async def release(self) -> None:
        """Count the embeddings no more: whoever wanted them has them no more."""
        await self._held.aclose()

    async def _tensor(self, embedding: Embedding) -> torch.Tensor:
        if embedding.info.size_bytes <= _INLINE_BYTES:
            return tensor_of(embedding, self._dtype)
        return await in_passing_thread(tensor_of, embedding, self._dtype)

    def _size_bytes(self, ref: EmbeddingRef) -> int:
        return ref.token_count * ref.hidden_size * self._dtype.itemsize


def _rows(embedding: torch.Tensor, place: PlaceholderRange) -> torch.Tensor:
    return embedding[place.offset : place.offset + place.length]
