"""Encodes in progress, each shared by all who want the embedding: one in this process, one in the whole fleet."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any, Final

import structlog

from shared.embedding import Embedding
from shared.errors import ServiceError
from shared.local_cache import LocalEmbeddingCache
from shared.patience import Patience
from shared.rpc.deadline import remaining_s
from shared.store import EmbeddingStore
from shared.tasks import cancelled
from vision_service.batcher import Deadline
from vision_service.encoded import CacheTier, Encoded, Wanted
from vision_service.fleet import Fleet, Lease
from vision_service.maker import EmbeddingMaker, Made
from vision_service.metrics import UNOBSERVED, VisionMetrics

log = structlog.get_logger()
_CLOSE_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Caches:
    """Where embeddings are kept: in this process's memory, and in the store that all replicas share."""

    local: LocalEmbeddingCache
    store: EmbeddingStore


@dataclass(slots=True, eq=False)
class Flight:
    """An encode in progress, or one of another replica that is waited for; only the first has the medium's bytes.

    `kept`: whether the caches may have the embedding.
    """

    wanted: Wanted
    deadline: Deadline
    task: asyncio.Task[Encoded | None]
    has_bytes: bool
    kept: bool = True


class Flights:
    """Encodes in progress by embedding. One event loop only.

    No caller's leaving ends an encode: what has begun is finished and kept.
    """

    def __init__(
        self, maker: EmbeddingMaker, caches: Caches, fleet: Fleet, metrics: VisionMetrics = UNOBSERVED
    ) -> None:
        self._maker = maker
        self._metrics = metrics
        self._caches = caches
        self._fleet = fleet
        self._flights: dict[str, Flight] = {}
        self._finishing: set[asyncio.Task[None]] = set()

    def __contains__(self, digest: str) -> bool:
        return digest in self._flights

    def count(self, *, videos: bool) -> int:
        """Return how many pictures, or videos, are held in memory."""
        return sum(flight.has_bytes and flight.wanted.is_video is videos for flight in self._flights.values())

    async def join(self, wanted: Wanted) -> Encoded | None:
        """Return what a flight in progress comes to; None: another replica has given it up. Raises its error."""
        flight = self._flights[wanted.key.digest]
        flight.deadline.extend(remaining_s(), urgent=not wanted.prefetch)
        encoded = await asyncio.shield(flight.task)
        return encoded and replace(encoded, coalesced=True)

    async def lead(self, wanted: Wanted, content: bytes) -> Encoded:
        """Encode the medium, or share the encode of the replica that was first. Nobody else may have begun here."""
        deadline = Deadline(remaining_s(), urgent=not wanted.prefetch)
        work = self._lead(wanted, content, deadline)
        encoded = await asyncio.shield(self._begin(wanted, deadline, work, has_bytes=True))
        assert encoded is not None
        return encoded

    def follow(self, wanted: Wanted) -> None:
        """Begin to wait for another replica's encode, so that callers can join."""
        self._begin(wanted, Deadline(None), self._followed(wanted), has_bytes=False)

    def erase_tagged(self, tenant_tag: str, media_digest: str | None) -> None:
        """Keep nothing that is being made of a medium, or for a tenant; who waits for it gets it all the same."""
        for flight in self._flights.values():
            if flight.wanted.key.name.belongs_to(tenant_tag, media_digest):
                flight.kept = False

    def clear(self) -> None:
        """Keep nothing that is being made."""
        for flight in self._flights.values():
            flight.kept = False

    async def close(self) -> None:
        """Abandon the encodes in progress; what is made gets a moment to be stored, and every lease is given back."""
        await cancelled(*(flight.task for flight in self._flights.values()))
        if self._finishing:
            _, late = await asyncio.wait(self._finishing, timeout=_CLOSE_S)
            await cancelled(*late)

    def _begin(
        self, wanted: Wanted, deadline: Deadline, work: Coroutine[Any, Any, Encoded | None], *, has_bytes: bool
    ) -> asyncio.Task[Encoded | None]:
        digest = wanted.key.digest
        assert digest not in self._flights
        task = asyncio.create_task(work)
        self._flights[digest] = Flight(wanted, deadline, task, has_bytes)
        task.add_done_callback(lambda _: self._land(digest))
        return task

    def _land(self, digest: str) -> None:
        task = self._flights.pop(digest).task
        if not task.cancelled():
            task.exception()  # looked at here, because its callers may all have left

    async def _lead(self, wanted: Wanted, content: bytes, deadline: Deadline) -> Encoded:
        digest = wanted.key.digest
        while (lease := await self._fleet.take(digest, patience := Patience())) is None:
            if found := await self._followed(wanted):
                return found
        try:
            # Another replica may have stored it, and given its lease back, since this one has looked.
            if info := await self._caches.store.describe(wanted.key, patience):
                await lease.finish()
                return Encoded(wanted.key, info, CacheTier.STORE, coalesced=True)
            made = await self._maker.make(wanted, content, deadline)
        except BaseException as error:
            known = error if isinstance(error, ServiceError) else None
            self._metrics.encode_errors.inc(reason=known.reason.lower() if known else "internal")
            await lease.finish(known)
            raise
        self._note(wanted, made)
        self._keep(self._flights[digest].kept, made.embedding, lease)
        return Encoded(wanted.key, made.embedding.info, CacheTier.NONE, timings=made.timings)

    def _keep(self, kept: bool, embedding: Embedding, lease: Lease) -> None:
        """Put the embedding where others look for it, without waiting; then those who wait for it are told."""
        writing = None
        if kept:
            self._caches.local.put(embedding)
            writing = self._caches.store.put(embedding)
        task = asyncio.create_task(_finish(writing, lease))
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)

    async def _followed(self, wanted: Wanted) -> Encoded | None:
        """Wait until another replica has stored the embedding; None: it has given up, or cannot be heard of.

        Raises what is wrong with the medium, if the other replica says so.
        """
        with self._fleet.watch(wanted.key.digest) as watch:
            while True:
                # First the lease, then the store: an embedding is stored before its lease is given back.
                is_going_on = await self._fleet.is_encoding(wanted.key.digest, Patience())
                info = await self._caches.store.describe(wanted.key, Patience())
                if info is not None:
                    self._metrics.leases.inc(outcome="followed")
                    return Encoded(wanted.key, info, CacheTier.STORE, coalesced=True)
                if not is_going_on:
                    self._metrics.leases.inc(outcome="expired")
                    return None
                await watch.news()

    def _note(self, wanted: Wanted, made: Made) -> None:
        kind, timings = "video" if wanted.is_video else "picture", made.timings
        self._metrics.encodes.inc(kind=kind)
        self._metrics.preprocess.observe(timings.preprocess_s)
        self._metrics.queue.observe(timings.queue_s)
        self._metrics.encode.observe(timings.encode_s)
        log.info(
            f"{kind}_encoded",
            digest=made.embedding.digest,
            tiles=made.embedding.info.tile_count,
            preprocess_ms=round(timings.preprocess_s * 1e3, 1),
            queue_ms=round(timings.queue_s * 1e3, 1),
            encode_ms=round(timings.encode_s * 1e3, 1),
        )


async def _finish(writing: asyncio.Future[bool] | None, lease: Lease) -> None:
    try:
        if writing is not None:
            await asyncio.wait([writing])
    finally:
        await lease.finish()
