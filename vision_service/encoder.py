"""Turns media digests into embeddings: from a cache where one holds it, else by encoding the medium once."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shared import tracing
from shared.digest import digest_of
from shared.embedding import Embedding, EmbeddingKey
from shared.errors import EmbeddingNotFound, MediaDigestMismatch, QueueFull
from shared.patience import Patience
from shared.stored_name import tenant_tag_of
from vision_service.encoded import CacheTier, Encoded, Upload, Wanted
from vision_service.fleet import Fleet
from vision_service.flights import Caches, Flights
from vision_service.maker import EmbeddingMaker
from vision_service.metrics import UNOBSERVED, VisionMetrics
from vision_service.preparer import MediaSpec
from vision_service.runner import WorkerPool

_INLINE_HASH_BYTES = 64 << 10  # hashing less takes the event loop under 0.1 ms


@dataclass(frozen=True, slots=True)
class PendingLimits:
    """The most media held in memory on their way to an embedding."""

    pictures: int
    videos: int

    def of(self, *, video: bool) -> int:
        """Return the limit for one kind."""
        return self.videos if video else self.pictures


class Encoder:
    """The heart of the service. One event loop only.

    Concurrent calls for the same embedding share one encode, whichever replicas they reach, which no caller's leaving
    ends: an encode that has begun is finished and kept.
    """

    def __init__(
        self,
        maker: EmbeddingMaker,
        caches: Caches,
        fleet: Fleet,
        workers: WorkerPool,
        max_pending: PendingLimits,
        metrics: VisionMetrics = UNOBSERVED,
    ) -> None:
        self._maker = maker
        self._metrics = metrics
        self._caches = caches
        self._fleet = fleet
        self._flights = Flights(maker, caches, fleet, metrics)
        self._workers = workers
        self._max_pending = max_pending
        self._reading: Counter[bool] = Counter()  # by whether it is a video

    def wanted(self, media_digest: str, spec: MediaSpec, tenant: str = "", *, prefetch: bool = False) -> Wanted:
        """Return what to ask for to get the embedding of a medium."""
        return Wanted(self._maker.key_of(media_digest, spec, tenant), spec, prefetch)

    async def encode(self, wanted: Wanted, upload: Upload) -> Encoded:
        """Return the embedding of a medium, from a cache if possible.

        `upload` is looked at only on a miss. Raises `EmbeddingNotFound` on a miss without bytes, `MediaDigestMismatch`,
        `MediaTooLarge`, what the upload and the preparer raise, `QueueFull` and `DeadlineExceeded`.
        """
        encoded = await self._found(wanted) or await self._made(wanted, upload)
        self._metrics.lookups.inc(tier=encoded.tier.value)
        facts = {"internvl.cache_tier": encoded.tier.value, "internvl.tiles": encoded.info.tile_count}
        tracing.current().note(facts | {"internvl.coalesced": encoded.coalesced})
        if encoded.coalesced:
            self._metrics.coalesced.inc(scope="fleet" if encoded.tier is CacheTier.STORE else "process")
        return encoded

    async def fetch(self, key: EmbeddingKey) -> Embedding:
        """Return an embedding with its tensor, or raise `EmbeddingNotFound`."""
        embedding = self._caches.local.get(key) or await self._caches.store.get(key)
        if embedding is None:
            raise EmbeddingNotFound("No cache holds the embedding; encode the medium again.", resource=key.digest)
        return embedding

    async def erase(self, tenant: str, media_digest: str | None) -> int:
        """Remove the embeddings of a medium, or of all media of a tenant; return how many the store held.

        What is being encoded now is not kept. Raises `StoreUnavailable`: then the store may hold some still.
        """
        self.erase_tagged(tenant_tag_of(tenant), media_digest)
        return await self._caches.store.erase(tenant, media_digest)

    def erase_tagged(self, tenant_tag: str, media_digest: str | None) -> None:
        """Remove embeddings from this process's memory, those included that are being made."""
        self._caches.local.erase_tagged(tenant_tag, media_digest)
        self._flights.erase_tagged(tenant_tag, media_digest)

    def clear(self) -> None:
        """Remove all embeddings from this process's memory, those included that are being made."""
        self._caches.local.clear()
        self._flights.clear()

    async def close(self) -> None:
        """Abandon the encodes in progress."""
        await self._flights.close()

    async def _made(self, wanted: Wanted, upload: Upload) -> Encoded:
        content = None
        # Bytes need room; to ask without any needs none.
        if await upload.follows() and wanted.key.digest not in self._flights:
            with self._admitted(video=wanted.is_video):
                content = await self._read(upload, wanted.key.media_digest)
        # While this call was reading, another may have begun, or even ended, the same encode.
        if found := await self._landed(wanted):
            return found
        if content is None:
            raise EmbeddingNotFound("No cache holds the embedding; send the medium.", resource=wanted.key.digest)
        return await self._flights.lead(wanted, content)

    async def _found(self, wanted: Wanted) -> Encoded | None:
        """Return what a cache holds, or what an encode comes to that has begun here or on another replica."""
        digest = wanted.key.digest
        while True:
            if found := await self._landed(wanted):
                return found
            patience = Patience()
            info = await self._caches.store.describe(wanted.key, patience)
            if info is not None:
                return Encoded(wanted.key, info, CacheTier.STORE)
            if digest not in self._flights:
                if not await self._fleet.is_encoding(digest, patience):
                    return None if digest not in self._flights else await self._landed(wanted)
                if digest not in self._flights:
                    self._flights.follow(wanted)

    async def _landed(self, wanted: Wanted) -> Encoded | None:
        """Return what is in memory, or what a flight in progress comes to."""
        while not (embedding := self._caches.local.get(wanted.key)):
            if wanted.key.digest not in self._flights:
                return None
            if encoded := await self._flights.join(wanted):
                return encoded
        return Encoded(wanted.key, embedding.info, CacheTier.LOCAL)

    @contextmanager
    def _admitted(self, *, video: bool) -> Iterator[None]:
        """Count a medium whose bytes are being received; refuse one too many before they are."""
        if self._reading[video] + self._flights.count(videos=video) >= self._max_pending.of(video=video):
            kind = "videos" if video else "pictures"
            raise QueueFull(f"Too many {kind} are being worked on; try again later.", retry_after_s=1.0)
        self._reading[video] += 1
        try:
            yield
        finally:
            self._reading[video] -= 1

    async def _read(self, upload: Upload, media_digest: str) -> bytes:
        content = await upload.read()
        large = len(content) > _INLINE_HASH_BYTES
        actual = await self._workers.run(digest_of, content) if large else digest_of(content)
        if actual != media_digest:
            raise MediaDigestMismatch("The bytes do not have the announced digest.", field="header.media_digest")
        return content
