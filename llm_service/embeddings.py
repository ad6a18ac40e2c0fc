"""Fetches the embeddings of a prompt: from memory, from the store, else from the vision replica that made them."""

import asyncio
import time
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from llm_service.prompt.dialogue import EmbeddingRef
from shared.embedding import Embedding, EmbeddingInfo, row_bytes_of
from shared.errors import EmbeddingIncompatible
from shared.local_cache import LocalEmbeddingCache
from shared.rpc.deadline import detached
from shared.store import EmbeddingStore
from shared.tasks import cancelled

_BYTES_PER_S: Final = 500e6  # what a healthy store sends


@dataclass(frozen=True, slots=True)
class Hedge:
    """When to ask a vision replica as well as the store: after `answer_s`, and the time that a healthy one sends for.

    A store that was overtaken is not left before `linger_s`: by then it has failed by itself where it is away, and
    requests to come do not wait for it.
    """

    answer_s: float = 0.05
    linger_s: float = 0.3


_HEDGE: Final = Hedge()


class FetchTier(Enum):
    """Where an embedding was read from."""

    LOCAL = "local"
    STORE = "store"
    VISION = "vision"
    PREFIX = "prefix"  # not at all: its keys and values were in the KV cache


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

    def __init__(
        self, local: LocalEmbeddingCache, store: EmbeddingStore, vision: EmbeddingSource, hedge: Hedge = _HEDGE
    ) -> None:
        self._local = local
        self._store = store
        self._vision = vision
        self._hedge = hedge
        self._overtaken: set[asyncio.Task[Embedding | None]] = set()
        self._fetches: dict[EmbeddingRef, asyncio.Task[tuple[Embedding, FetchTier]]] = {}

    async def read(self, ref: EmbeddingRef) -> FetchedEmbedding:
        """Return the embedding.

        Raises `EmbeddingNotFound` if nobody has it and `EmbeddingIncompatible` if it is not what `ref` says.
        """
        started = time.monotonic()
        known = self._local.get(ref.key)
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
        epoch = self._local.epoch
        embedding, tier = await self._hedged(ref)
        self._local.put(embedding, epoch)
        return embedding, tier

    async def _hedged(self, ref: EmbeddingRef) -> tuple[Embedding, FetchTier]:
        """Ask the store; where it has nothing, or has not answered in time, ask vision as well."""
        stored = asyncio.create_task(self._store.get(ref.key))
        try:
            await asyncio.wait({stored}, timeout=self._hedge.answer_s + _size_bytes(ref) / _BYTES_PER_S)
            if stored.done() and (embedding := stored.result()):
                return embedding, FetchTier.STORE
            return await self._raced(ref, stored)
        finally:
            self._leave(stored)

    async def _raced(self, ref: EmbeddingRef, stored: asyncio.Task[Embedding | None]) -> tuple[Embedding, FetchTier]:
        """Return what the store or vision has, whichever comes first; raise what vision raises if neither has it."""
        made = asyncio.create_task(self._vision.fetch(ref))
        try:
            await asyncio.wait({stored, made}, return_when=asyncio.FIRST_COMPLETED)
            # Where vision has failed, the store may still have it.
            if (not made.done() or made.exception()) and (embedding := await stored):
                return embedding, FetchTier.STORE
            return await made, FetchTier.VISION
        finally:
            await cancelled(made)

    def _leave(self, stored: asyncio.Task[Embedding | None]) -> None:
        """Let the store's answer come for a little longer, although nobody waits for it any more."""
        if stored.done():
            return
        leaving = asyncio.get_running_loop().call_later(self._hedge.linger_s, stored.cancel)
        self._overtaken.add(stored)  # a task that nobody names may vanish
        stored.add_done_callback(self._overtaken.discard)
        stored.add_done_callback(lambda _: leaving.cancel())


def check_shape(ref: EmbeddingRef, info: EmbeddingInfo) -> None:
    """Raise `EmbeddingIncompatible` if an embedding is not what the reference to it says."""
    found = (info.tile_count, info.token_count, info.hidden_size, info.data_type)
    if found != (ref.tile_count, ref.token_count, ref.hidden_size, ref.data_type):
        raise EmbeddingIncompatible("The embedding is not what its handle says; encode the medium again.")


def _size_bytes(ref: EmbeddingRef) -> int:
    return ref.token_count * row_bytes_of(ref.hidden_size, ref.data_type)
