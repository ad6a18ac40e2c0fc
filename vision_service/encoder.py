"""Turns media digests into embeddings: from a cache where one holds it, else by encoding the medium once."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

import structlog

from shared.digest import digest_of, digest_of_fields
from shared.embedding import DataType, Embedding, EmbeddingInfo, max_tiles
from shared.errors import EmbeddingNotFound, MediaDigestMismatch, MediaTooLarge, QueueFull
from shared.rpc.deadline import remaining_s
from shared.store import EmbeddingStore, LocalEmbeddingCache
from shared.tensors import bytes_of, data_type_of
from vision_service.batcher import Deadline, EncodedTiles
from vision_service.preparer import MediaSpec
from vision_service.preprocess.image import Picture, Tiles
from vision_service.runner import TowerIdentity, WorkerPool

log = structlog.get_logger()
_SCHEMA = "internvl-serving embedding v1"
_TENANT_SALT = ""  # tenants share embeddings: what one may know of another is decided in the gateway
_INLINE_HASH_BYTES = 64 << 10  # hashing less takes the event loop under 0.1 ms


class CacheTier(Enum):
    """Which cache held an embedding."""

    NONE = "none"
    LOCAL = "local"
    STORE = "store"


class Upload(Protocol):
    """A medium's bytes on their way from the caller. Both raise `InvalidRequest`."""

    async def follows(self) -> bool:
        """Return whether the caller sends the bytes at all, having read no more than the first of them."""

    async def read(self) -> bytes:
        """Return the bytes; to be called once, and after `follows`. Raises `MediaTooLarge`."""


class Tower(Protocol):
    """Encodes the tiles of one medium at a time; batches behind the scenes."""

    @property
    def identity(self) -> TowerIdentity:
        """What the tower's embeddings are named after."""

    async def encode(self, tiles: Tiles, deadline: Deadline) -> EncodedTiles:
        """Return the visual tokens; raises `QueueFull` and `DeadlineExceeded`."""


class Preparer(Protocol):
    """Turns the bytes of media into tiles."""

    async def prepare(self, content: bytes, spec: MediaSpec, deadline: Deadline) -> Picture:
        """Return the tiles.

        Raises `MediaUnreadable`, `MediaTooLarge`, `VideoRangeEmpty`, and `DeadlineExceeded` where it was not begun.
        """


@dataclass(frozen=True, slots=True)
class PendingLimits:
    """The most media held in memory on their way to an embedding."""

    pictures: int
    videos: int

    def of(self, *, video: bool) -> int:
        """Return the limit for one kind."""
        return self.videos if video else self.pictures


@dataclass(frozen=True, slots=True)
class EmbeddingLimits:
    """The most that the caches keep of one embedding, in bytes, and what of it a tile takes."""

    tokens_per_tile: int
    hidden_size: int
    max_bytes: int

    def max_tiles(self, data_type: DataType) -> int:
        """Return how many tiles a medium may have; 0 where not even one can be kept."""
        return max_tiles(self.tokens_per_tile, self.hidden_size, data_type, self.max_bytes)

    def check(self, tile_count: int, data_type: DataType) -> None:
        """Raise `MediaTooLarge` for a medium whose embedding nobody could fetch once it is made."""
        most = self.max_tiles(data_type)
        if tile_count > most:
            raise MediaTooLarge(f"The medium has {tile_count} tiles; embeddings of at most {most} can be kept.")


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of work; all zero on a hit."""

    preprocess_s: float = 0.0
    queue_s: float = 0.0
    encode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Encoded:
    """An embedding that exists, and how it was come by.

    `coalesced`: the call shared an encode that another call had begun.
    """

    digest: str
    media_digest: str
    info: EmbeddingInfo
    tier: CacheTier
    coalesced: bool = False
    timings: Timings = Timings()


@dataclass(frozen=True, slots=True, eq=False)
class _Flight:
    encoding: asyncio.Task[Encoded]
    deadline: Deadline
    video: bool


class Encoder:
    """The heart of the service. One event loop only.

    Concurrent calls for the same embedding share one encode, which no caller's leaving ends: an encode that has begun
    is finished and kept.
    """

    def __init__(
        self,
        tower: Tower,
        preparer: Preparer,
        workers: WorkerPool,
        store: EmbeddingStore,
        cache: LocalEmbeddingCache,
        max_pending: PendingLimits,
        limits: EmbeddingLimits,
    ) -> None:
        self._tower = tower
        self._preparer = preparer
        self._workers = workers
        self._store = store
        self._cache = cache
        self._max_pending = max_pending
        self._limits = limits
        self._flights: dict[str, _Flight] = {}
        self._reading: Counter[bool] = Counter()  # by whether it is a video

    async def encode(self, media_digest: str, spec: MediaSpec, upload: Upload) -> Encoded:
        """Return the embedding of a medium, from a cache if possible.

        `upload` is looked at only on a miss. Raises `EmbeddingNotFound` on a miss without bytes, `MediaDigestMismatch`,
        `MediaTooLarge`, what the upload and the preparer raise, `QueueFull` and `DeadlineExceeded`.
        """
        digest = self.digest_of(media_digest, spec)
        if found := await self._look_up(digest, media_digest):
            return found
        content = None
        # Bytes need room; to ask without any needs none.
        if digest not in self._flights and await upload.follows() and digest not in self._flights:
            with self._admitted(video=spec.video is not None):
                content = await self._read(upload, media_digest)
        # While this call was reading, another may have begun, or even ended, the same encode.
        if found := self._in_memory(digest, media_digest):
            return found
        if digest in self._flights:
            return await self._join(self._flights[digest])
        if content is None:
            raise EmbeddingNotFound("No cache holds the embedding; send the medium.", resource=digest)
        return await asyncio.shield(self._start(digest, media_digest, spec, content))

    async def fetch(self, digest: str) -> Embedding:
        """Return an embedding with its tensor, or raise `EmbeddingNotFound`."""
        embedding = self._cache.get(digest) or await self._store.get(digest)
        if embedding is None:
            raise EmbeddingNotFound("No cache holds the embedding; encode the medium again.", resource=digest)
        return embedding

    def digest_of(self, media_digest: str, spec: MediaSpec) -> str:
        """Return the embedding digest: SHA-256 of everything that decides the embedding's value."""
        identity = self._tower.identity
        medium = identity.data_type, _TENANT_SALT, bytes.fromhex(media_digest)
        return digest_of_fields(_SCHEMA, identity.fingerprint, *spec.identity, *medium)

    async def close(self) -> None:
        """Abandon the encodes in progress."""
        encodings = [flight.encoding for flight in self._flights.values()]
        for encoding in encodings:
            encoding.cancel()
        await asyncio.gather(*encodings, return_exceptions=True)

    def _in_memory(self, digest: str, media_digest: str) -> Encoded | None:
        embedding = self._cache.get(digest)
        return Encoded(digest, media_digest, embedding.info, CacheTier.LOCAL) if embedding else None

    async def _look_up(self, digest: str, media_digest: str) -> Encoded | None:
        if (found := self._in_memory(digest, media_digest)) or digest in self._flights:
            return found
        info = await self._store.describe(digest)
        return Encoded(digest, media_digest, info, CacheTier.STORE) if info else None

    @contextmanager
    def _admitted(self, *, video: bool) -> Iterator[None]:
        """Count a medium whose bytes are being received; refuse one too many before they are."""
        in_flight = sum(flight.video is video for flight in self._flights.values())
        if self._reading[video] + in_flight >= self._max_pending.of(video=video):
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

    def _start(self, digest: str, media_digest: str, spec: MediaSpec, content: bytes) -> asyncio.Task[Encoded]:
        deadline = Deadline(remaining_s())
        encoding = asyncio.create_task(self._encode(digest, media_digest, spec, content, deadline))
        self._flights[digest] = _Flight(encoding, deadline, spec.video is not None)
        encoding.add_done_callback(lambda _: self._land(digest))
        return encoding

    async def _join(self, flight: _Flight) -> Encoded:
        flight.deadline.extend(remaining_s())
        return replace(await asyncio.shield(flight.encoding), coalesced=True)

    def _land(self, digest: str) -> None:
        encoding = self._flights.pop(digest).encoding
        if not encoding.cancelled():
            encoding.exception()  # looked at here, because its callers may all have left

    async def _encode(
        self, digest: str, media_digest: str, spec: MediaSpec, content: bytes, deadline: Deadline
    ) -> Encoded:
        started = time.monotonic()
        picture = await self._preparer.prepare(content, spec, deadline)
        del content  # of no more use, and large
        preprocess_s = time.monotonic() - started
        self._limits.check(len(picture.tiles), self._tower.identity.data_type)
        encoded = await self._tower.encode(picture.tiles, deadline)
        embedding = await self._workers.run(_embedding_of, digest, picture, encoded)
        self._cache.put(embedding)
        await self._store.put(embedding)  # before answering: whoever gets the handle will look there first
        timings = Timings(preprocess_s, encoded.queue_s, encoded.encode_s)
        event = "picture_encoded" if spec.video is None else "video_encoded"
        log.info(event, digest=digest, tiles=embedding.info.tile_count, **_milliseconds(timings))
        return Encoded(digest, media_digest, embedding.info, CacheTier.NONE, timings=timings)


def _embedding_of(digest: str, picture: Picture, encoded: EncodedTiles) -> Embedding:
    pieces = list(encoded.pieces)
    info = EmbeddingInfo(
        tile_count=len(picture.tiles),
        token_count=sum(len(piece) for piece in pieces),
        hidden_size=pieces[0].shape[1],
        data_type=data_type_of(pieces[0]),
        width=picture.width,
        height=picture.height,
        columns=picture.grid.columns,
        rows=picture.grid.rows,
        frames=picture.frames,
    )
    return Embedding(digest, info, bytes_of(*pieces))


def _milliseconds(timings: Timings) -> dict[str, float]:
    return {
        "preprocess_ms": round(timings.preprocess_s * 1e3, 1),
        "queue_ms": round(timings.queue_s * 1e3, 1),
        "encode_ms": round(timings.encode_s * 1e3, 1),
    }
