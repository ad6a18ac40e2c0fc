"""Fetches the embeddings of a prompt: from memory, from the store, else from the vision replica that made them."""

import asyncio
import time
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from llm_service.prompt.dialogue import EmbeddingRef
from shared.embedding import Embedding, EmbeddingInfo
from shared.errors import EmbeddingIncompatible
from shared.rpc.deadline import detached
from shared.store import EmbeddingStore, LocalEmbeddingCache


class FetchTier(Enum):
    """Where an embedding was read from."""

    LOCAL = "local"
    STORE = "store"
    VISION = "vision"


@dataclass(frozen=True, slots=True)
class FetchedEmbedding:
    """An embedding, where it came from and how long that took."""

    embedding: Embedding
    tier: FetchTier
    duration_s: float


class EmbeddingSource(Protocol):
    """The vision replicas, as the LLM service sees them."""

    async def fetch(self, ref: EmbeddingRef) -> Embedding:
        """Return the embedding from the replica that `ref` names.

        Raises `EmbeddingNotFound` if it is gone and `EmbeddingIncompatible` if it is not what `ref` says.
        """


class EmbeddingReader:
    """Reads embeddings by reference. Readers of the same embedding share one fetch, which no caller's end ends."""

    def __init__(self, local: LocalEmbeddingCache, store: EmbeddingStore, vision: EmbeddingSource) -> None:
        self._local = local
        self._store = store
        self._vision = vision
        self._fetches: dict[EmbeddingRef, asyncio.Task[tuple[Embedding, FetchTier]]] = {}

    async def read(self, ref: EmbeddingRef) -> FetchedEmbedding:
        """Return the embedding.

        Raises `EmbeddingNotFound` if nobody has it and `EmbeddingIncompatible` if it is not what `ref` says.
        """
        started = time.monotonic()
        known = self._local.get(ref.digest)
        embedding, tier = (known, FetchTier.LOCAL) if known else await asyncio.shield(self._shared_fetch(ref))
        check_shape(ref, embedding.info)
        return FetchedEmbedding(embedding, tier, time.monotonic() - started)

    def _shared_fetch(self, ref: EmbeddingRef) -> asyncio.Task[tuple[Embedding, FetchTier]]:
        task = self._fetches.get(ref)
        if task is None:
            task = asyncio.create_task(self._fetch(ref), context=detached())
            self._fetches[ref] = task
            task.add_done_callback(lambda done: self._forget(ref, done))
        return task

    def _forget(self, ref: EmbeddingRef, task: asyncio.Task[tuple[Embedding, FetchTier]]) -> None:
        del self._fetches[ref]
        if not task.cancelled():
            task.exception()  # looked at, so that a fetch whose callers have all left does not warn

    async def _fetch(self, ref: EmbeddingRef) -> tuple[Embedding, FetchTier]:
        tier = FetchTier.STORE
        embedding = await self._store.get(ref.digest)
        if embedding is None:
            tier = FetchTier.VISION
            embedding = await self._vision.fetch(ref)
        self._local.put(embedding)
        return embedding, tier


def check_shape(ref: EmbeddingRef, info: EmbeddingInfo) -> None:
    """Raise `EmbeddingIncompatible` if an embedding is not what the reference to it says."""
    found = (info.tile_count, info.token_count, info.hidden_size, info.data_type)
    if found != (ref.tile_count, ref.token_count, ref.hidden_size, ref.data_type):
        raise EmbeddingIncompatible("The embedding is not what its handle says; encode the medium again.")
