"""The embedding store: what it promises, and how it keeps that over Redis."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Final, Protocol

import structlog

from shared.bulk import BulkConnections
from shared.embedding import Embedding, EmbeddingInfo, EmbeddingKey
from shared.embedding_values import Bytes, EmbeddingFormat
from shared.erasures import erase_stored
from shared.patience import Patience
from shared.redis_link import RedisLink, StoreFailed
from shared.settings import EmbeddingStoreSettings
from shared.stored_name import StoredName, tenant_tag_of
from shared.tasks import cancelled
from shared.transfer import Transfers, ValueDamaged, ValueMissing
from shared.write_queue import DEFAULT_LIMITS, QueueLimits, WriteQueue, settled

log = structlog.get_logger()
# Embeddings read at a time: 16 MiB on the way, which a link of 1 Gbit/s carries within the time limit of each value.
_READERS: Final = 4
_DRAIN_S: Final = 5.0


class EmbeddingStore(Protocol):
    """Keeps embeddings until they expire, are evicted or erased. Safe to share between tasks.

    Absence, failure and damage are misses: nothing is raised but what is named, and the caller's own cancellation.
    """

    async def describe(self, key: EmbeddingKey, patience: Patience) -> EmbeddingInfo | None:
        """Return what is stored if all of it is there, without reading it; None is a miss."""

    async def get(self, key: EmbeddingKey) -> Embedding | None:
        """Return the embedding; None is a miss. What does not verify is deleted and is a miss."""

    def put(self, embedding: Embedding) -> asyncio.Future[bool]:
        """Queue the embedding for writing; the future is False where it was dropped, refused, erased or failed."""

    async def erase(self, tenant: str, media_digest: str | None) -> int:
        """Remove a tenant's embeddings of one medium, None: of all its media; return how many there were.

        Tells every process that listens for erasures. Raises `StoreUnavailable`; to be called again then.
        """

    async def delete(self, key: EmbeddingKey) -> None:
        """Forget the embedding."""


class NoEmbeddingStore:
    """The store of a service that runs without one: always a miss."""

    async def describe(self, key: EmbeddingKey, patience: Patience) -> EmbeddingInfo | None:
        """Miss."""
        return None

    async def get(self, key: EmbeddingKey) -> Embedding | None:
        """Miss."""
        return None

    def put(self, embedding: Embedding) -> asyncio.Future[bool]:
        """Keep nothing."""
        return settled(written=False)

    async def erase(self, tenant: str, media_digest: str | None) -> int:
        """Nothing to remove, and nobody to tell."""
        return 0

    async def delete(self, key: EmbeddingKey) -> None:
        """Nothing to forget."""


class RedisEmbeddingStore:
    """Embeddings in Redis, one value per group of rows; see `shared.embedding_values` for the values.

    The link carries what is small, `connections` the groups, on a few threads. Used as an async context: what was put
    is written inside it, and nothing is written any more at its end; `drain` first.
    """

    def __init__(
        self,
        link: RedisLink,
        connections: BulkConnections,
        value_format: EmbeddingFormat,
        ttl_s: int,
        limits: QueueLimits = DEFAULT_LIMITS,
    ) -> None:
        self.queue = WriteQueue(self._write_queued, self._take_back, limits, link.observer)
        self.timeout_s = link.timeout_s
        self._link = link
        self._connections = connections
        self._format = value_format
        self._ttl_s = ttl_s
        self._transfers = Transfers(connections, value_format, link.timeout_s)
        self._reading = asyncio.Semaphore(_READERS)
        self._readers = ThreadPoolExecutor(_READERS, "store-read")
        self._writer = ThreadPoolExecutor(1, "store-write")

    async def __aenter__(self) -> "RedisEmbeddingStore":
        """Begin to write."""
        self._writing = asyncio.create_task(self.queue.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop writing, and close."""
        await cancelled(self._writing)
        for threads in (self._readers, self._writer):
            threads.shutdown(wait=False, cancel_futures=True)
        self._connections.close()

    async def drain(self, timeout_s: float) -> None:
        """Wait until everything that was put is written, for so long at most."""
        await self.queue.drain(timeout_s)

    async def describe(self, key: EmbeddingKey, patience: Patience) -> EmbeddingInfo | None:
        """Return what is stored if all of it is there; None is a miss."""
        with suppress(StoreFailed):
            return await self.find(key.name, patience)
        return None

    async def find(self, name: StoredName, patience: Patience) -> EmbeddingInfo | None:
        """Return what is stored under a name if all of it is there. Raises `StoreFailed`."""
        info = await self._manifest(name, patience)
        if info is None:
            return None
        keys = [name.group_key(index) for index in range(info.group_count)]
        present = await self._link.attempt("exists", lambda: self._link.redis.exists(*keys), patience)
        return info if present == info.group_count else None

    async def get(self, key: EmbeddingKey) -> Embedding | None:
        """Return the embedding, from the queue where it is still on its way; None is a miss.

        What does not verify is deleted.
        """
        if queued := self.queue.get(key):
            return queued
        with suppress(StoreFailed):
            found = await self.read(key.name)
            return Embedding(key, *found) if found else None
        return None

    async def read(self, name: StoredName) -> tuple[EmbeddingInfo, memoryview] | None:
        """Return what is stored under a name; None is a miss. What does not verify is deleted. Raises `StoreFailed`."""
        patience = Patience(self._link.timeout_s)
        info = await self._manifest(name, patience)
        if info is None:
            return None
        async with self._reading:
            payload = await self._groups(name, info, patience)
        return None if payload is None else (info, payload)

    def put(self, embedding: Embedding) -> asyncio.Future[bool]:
        """Queue the embedding for writing."""
        if not embedding.info.plausible():
            return settled(written=False)
        if not self._link.breaker.allow():
            self._link.observer.write_dropped("breaker_open")
            return settled(written=False)
        return self.queue.put(embedding)

    async def write(self, name: StoredName, info: EmbeddingInfo, payload: Bytes) -> None:
        """Store an embedding under a name, past the queue. Raises `StoreFailed`."""
        stop = threading.Event()

        def writing() -> asyncio.Future[None]:
            loop, work = asyncio.get_running_loop(), self._transfers.write
            return loop.run_in_executor(self._writer, work, name, info, payload, self._ttl_s, stop)

        try:
            await self._link.attempt("write", writing, self._for_all_groups(info))
        finally:
            stop.set()

    async def erase(self, tenant: str, media_digest: str | None) -> int:
        """Remove a tenant's embeddings of one medium, None: of all its media; return how many there were."""
        tenant_tag = tenant_tag_of(tenant)
        self.queue.erase_tagged(tenant_tag, media_digest)
        return await erase_stored(self._link, tenant_tag, media_digest)

    async def delete(self, key: EmbeddingKey) -> None:
        """Forget the manifest; groups without one expire."""
        await self._forget(key.name)

    async def _manifest(self, name: StoredName, patience: Patience) -> EmbeddingInfo | None:
        value = await self._link.attempt("get", lambda: self._link.redis.get(name.manifest_key), patience)
        if value is None:
            return None
        info = self._format.read_manifest(name, value)
        if info is None:
            await self._reject(name)
        return info

    async def _groups(self, name: StoredName, info: EmbeddingInfo, patience: Patience) -> memoryview | None:
        stop = threading.Event()

        def reading() -> asyncio.Future[memoryview]:
            loop, work = asyncio.get_running_loop(), self._transfers.read
            return loop.run_in_executor(self._readers, work, name, info, patience.left_s, stop)

        try:
            return await self._link.attempt("read", reading, self._for_all_groups(info))
        except ValueDamaged:
            await self._reject(name)
        except (ValueMissing, MemoryError):
            pass
        finally:
            stop.set()
        return None

    def _for_all_groups(self, info: EmbeddingInfo) -> Patience:
        """Return what a transfer may take in all; the thread itself gives up earlier, unless it hangs in a lookup."""
        return Patience(self._link.timeout_s * (info.group_count + 3))

    async def _reject(self, name: StoredName) -> None:
        log.warning("stored_embedding_rejected", digest=name.digest)
        await self._forget(name)

    async def _forget(self, name: StoredName) -> None:
        await self._link.ask("unlink", lambda: self._link.redis.unlink(name.manifest_key))

    async def _write_queued(self, embedding: Embedding) -> bool:
        try:
            await self.write(embedding.key.name, embedding.info, embedding.payload)
        except StoreFailed as failure:
            self._link.observer.write_dropped(failure.reason)
            return False
        return True

    async def _take_back(self, embedding: Embedding) -> None:
        name = embedding.key.name
        keys = [name.manifest_key, *map(name.group_key, range(embedding.info.group_count))]
        await self._link.ask("unlink", lambda: self._link.redis.unlink(*keys))


@asynccontextmanager
async def open_embedding_store(
    link: RedisLink | None, settings: EmbeddingStoreSettings
) -> AsyncIterator[RedisEmbeddingStore | NoEmbeddingStore]:
    """Yield the store that the settings describe over `link`; None is a service without one. Writes what is left."""
    if link is None:
        yield NoEmbeddingStore()
        return
    connections = BulkConnections(settings.redis_url.get_secret_value(), settings.redis_timeout_s)
    value_format = EmbeddingFormat(settings.embedding_key.get_secret_value())
    limits = QueueLimits(settings.embedding_write_items, settings.embedding_write_bytes)
    async with RedisEmbeddingStore(link, connections, value_format, settings.embedding_ttl_s, limits) as store:
        yield store
        await store.drain(_DRAIN_S)
