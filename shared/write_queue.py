"""Embeddings on their way to the store: bounded, written one by one, waited for by nobody."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, NoReturn

import structlog

from shared.embedding import Embedding, EmbeddingKey
from shared.metrics import StoreObserver
from shared.store_metrics import UNOBSERVED

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How many embeddings may wait, and how many bytes they may have together."""

    items: int = 256
    size_bytes: int = 256 << 20


DEFAULT_LIMITS: Final = QueueLimits()


@dataclass(slots=True, eq=False)
class _Entry:
    embedding: Embedding
    futures: list[asyncio.Future[bool]] = field(default_factory=list)
    erased: bool = False

    def future(self) -> asyncio.Future[bool]:
        """Return a future of its own for one who asks: cancelling it harms no other."""
        self.futures.append(asyncio.get_running_loop().create_future())
        return self.futures[-1]

    def settle(self, *, written: bool) -> None:
        for future in self.futures:
            if not future.done():
                future.set_result(written)


class WriteQueue:
    """Writes embeddings with `write`, in the order in which they came. One event loop only.

    `write` and `unwrite` never raise. `unwrite` takes back what was written while it was being erased.
    """

    def __init__(
        self,
        write: Callable[[Embedding], Awaitable[bool]],
        unwrite: Callable[[Embedding], Awaitable[None]],
        limits: QueueLimits = DEFAULT_LIMITS,
        observer: StoreObserver = UNOBSERVED,
    ) -> None:
        self._write = write
        self._unwrite = unwrite
        self._limits = limits
        self._observer = observer
        self._entries: OrderedDict[EmbeddingKey, _Entry] = OrderedDict()  # the one being written included, first
        self._came = asyncio.Event()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: EmbeddingKey) -> Embedding | None:
        """Return an embedding that is still waiting or being written."""
        entry = self._entries.get(key)
        return None if entry is None or entry.erased else entry.embedding

    def put(self, embedding: Embedding) -> asyncio.Future[bool]:
        """Queue the embedding; the future says whether it was written. False at once: there was no room for it."""
        entry = self._entries.get(embedding.key)
        if entry is not None and not entry.erased:
            return entry.future()
        if entry is not None or not self._has_room(embedding):
            self._observer.write_dropped("queue_full")
            log.warning("embedding_write_dropped", digest=embedding.digest, queued=len(self), bytes=self.size_bytes)
            return settled(written=False)
        entry = self._entries[embedding.key] = _Entry(embedding)
        self._count(embedding.info.size_bytes)
        self._came.set()
        return entry.future()

    async def run(self) -> NoReturn:
        """Write what comes, until cancelled."""
        try:
            while True:
                while not self._entries:
                    self._came.clear()
                    await self._came.wait()
                await self._write_one(next(iter(self._entries.values())))
        finally:
            for entry in list(self._entries.values()):
                self._observer.write_dropped("closing")
                self._remove(entry, written=False)

    async def drain(self, timeout_s: float) -> None:
        """Return when everything that is queued has been written or has failed, after `timeout_s` at the latest."""
        futures = [entry.future() for entry in self._entries.values()]
        if futures:
            await asyncio.wait(futures, timeout=timeout_s)

    def erase_tagged(self, tenant_tag: str, media_digest: str | None) -> None:
        """Do not write a tenant's embeddings of a medium, None: of any; take back what is being written."""
        self._erase(lambda key: key.name.belongs_to(tenant_tag, media_digest))

    def clear(self) -> None:
        """Write nothing of what is queued."""
        self._erase(lambda key: True)

    def _erase(self, concerns: Callable[[EmbeddingKey], bool]) -> None:
        for key, entry in list(self._entries.items()):
            if concerns(key):
                entry.erased = True

    async def _write_one(self, entry: _Entry) -> None:
        written = False
        try:
            if not entry.erased:
                written = await self._written(entry)
        finally:
            self._remove(entry, written=written)

    async def _written(self, entry: _Entry) -> bool:
        written = await self._write(entry.embedding)
        if entry.erased:
            await self._unwrite(entry.embedding)
        return written and not entry.erased

    def _remove(self, entry: _Entry, *, written: bool) -> None:
        del self._entries[entry.embedding.key]
        self._count(-entry.embedding.info.size_bytes)
        entry.settle(written=written)

    def _count(self, size_bytes: int) -> None:
        self.size_bytes += size_bytes
        self._observer.write_queue_changed(len(self), self.size_bytes)

    def _has_room(self, embedding: Embedding) -> bool:
        fits = self.size_bytes + embedding.info.size_bytes <= self._limits.size_bytes
        return fits and len(self) < self._limits.items


def settled(*, written: bool) -> asyncio.Future[bool]:
    """Return a future that is over."""
    future = asyncio.get_running_loop().create_future()
    future.set_result(written)
    return future
