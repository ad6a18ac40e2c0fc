"""Turns media digests into embeddings: from a cache where one holds it, else by encoding the picture once."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

import structlog

from shared.digest import digest_of, digest_of_fields
from shared.embedding import Embedding, EmbeddingInfo
from shared.errors import EmbeddingNotFound, MediaDigestMismatch, QueueFull
from shared.rpc.deadline import remaining_s
from shared.store import EmbeddingStore, LocalEmbeddingCache
from shared.tensors import bytes_of, data_type_of
from vision_service.batcher import Deadline, EncodedTiles
from vision_service.preprocess.image import Picture, Tiles, preprocess
from vision_service.preprocess.tiling import POLICY, TilingSpec
from vision_service.runner import TowerIdentity, WorkerPool

log = structlog.get_logger()
_SCHEMA = "internvl-serving embedding v1"
_TENANT_SALT = ""  # tenants share embeddings: what one may know of another is decided in the gateway
_INLINE_HASH_BYTES = 64 << 10  # hashing less takes the event loop under 0.1 ms

ReadContent = Callable[[], Awaitable[bytes | None]]


class CacheTier(Enum):
    """Which cache held an embedding."""

    NONE = "none"
    LOCAL = "local"
    STORE = "store"


class Tower(Protocol):
    """Encodes the tiles of one picture at a time; batches behind the scenes."""

    @property
    def identity(self) -> TowerIdentity:
        """What the tower's embeddings are named after."""

    async def encode(self, tiles: Tiles, deadline: Deadline) -> EncodedTiles:
        """Return the visual tokens; raises `QueueFull` and `DeadlineExceeded`."""


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


class Encoder:
    """The heart of the service. One event loop only.

    Concurrent calls for the same embedding share one encode, which no caller's leaving ends: an encode that has begun
    is finished and kept.
    """

    def __init__(
        self,
        tower: Tower,
        workers: WorkerPool,
        store: EmbeddingStore,
        cache: LocalEmbeddingCache,
        max_pixels: int,
        max_pending: int,
    ) -> None:
        self._tower = tower
        self._workers = workers
        self._store = store
        self._cache = cache
        self._max_pixels = max_pixels
        self._max_pending = max_pending
        self._flights: dict[str, _Flight] = {}
        self._reading = 0

    async def encode(self, media_digest: str, spec: TilingSpec, read_content: ReadContent) -> Encoded:
        """Return the embedding of a medium, from a cache if possible.

        `read_content` is called only on a miss; it returns the medium's bytes, or None where the caller has none.
        Raises `EmbeddingNotFound` on a miss without bytes, `MediaDigestMismatch`, what `preprocess` raises, `QueueFull`
        and `DeadlineExceeded`.
        """
        digest = self.digest_of(media_digest, spec)
        if found := await self._look_up(digest, media_digest):
            return found
        content = None
        if digest not in self._flights:
            with self._admitted():
                content = await self._read(read_content, media_digest)
        # While this call was reading, another may have begun, or even ended, the same encode.
        if found := self._in_memory(digest, media_digest):
            return found
        if digest in self._flights:
            return await self._join(self._flights[digest])
        if content is None:
            raise EmbeddingNotFound("No cache holds the embedding; send the picture.", resource=digest)
        return await asyncio.shield(self._start(digest, media_digest, spec, content))

    async def fetch(self, digest: str) -> Embedding:
        """Return an embedding with its tensor, or raise `EmbeddingNotFound`."""
        embedding = self._cache.get(digest) or await self._store.get(digest)
        if embedding is None:
            raise EmbeddingNotFound("No cache holds the embedding; encode the picture again.", resource=digest)
        return embedding

    def digest_of(self, media_digest: str, spec: TilingSpec) -> str:
        """Return the embedding digest: SHA-256 of everything that decides the embedding's value."""
        identity = self._tower.identity
        tiling = (spec.tile_size, spec.min_tiles, spec.max_tiles, int(spec.thumbnail), POLICY)
        return digest_of_fields(
            _SCHEMA, identity.fingerprint, *tiling, identity.data_type, _TENANT_SALT, bytes.fromhex(media_digest)
        )

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
    def _admitted(self) -> Iterator[None]:
        """Count a picture whose bytes are being received; refuse one too many before they are."""
        if self._reading + len(self._flights) >= self._max_pending:
            raise QueueFull("Too many pictures are being worked on; try again later.", retry_after_s=1.0)
        self._reading += 1
        try:
            yield
        finally:
            self._reading -= 1

    async def _read(self, read_content: ReadContent, media_digest: str) -> bytes | None:
        content = await read_content()
        if content is None:
            return None
        large = len(content) > _INLINE_HASH_BYTES
        actual = await self._workers.run(digest_of, content) if large else digest_of(content)
        if actual != media_digest:
            raise MediaDigestMismatch("The bytes do not have the announced digest.", field="header.media_digest")
        return content

    def _start(self, digest: str, media_digest: str, spec: TilingSpec, content: bytes) -> asyncio.Task[Encoded]:
        deadline = Deadline(remaining_s())
        encoding = asyncio.create_task(self._encode(digest, media_digest, spec, content, deadline))
        self._flights[digest] = _Flight(encoding, deadline)
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
        self, digest: str, media_digest: str, spec: TilingSpec, content: bytes, deadline: Deadline
    ) -> Encoded:
        started = time.monotonic()
        picture = await self._workers.run(preprocess, content, spec, self._max_pixels)
        preprocess_s = time.monotonic() - started
        encoded = await self._tower.encode(picture.tiles, deadline)
        embedding = await self._workers.run(_embedding_of, digest, picture, encoded)
        self._cache.put(embedding)
        await self._store.put(embedding)  # before answering: whoever gets the handle will look there first
        timings = Timings(preprocess_s, encoded.queue_s, encoded.encode_s)
        log.info("picture_encoded", digest=digest, tiles=embedding.info.tile_count, **_milliseconds(timings))
        return Encoded(digest, media_digest, embedding.info, CacheTier.NONE, timings=timings)


def _embedding_of(digest: str, picture: Picture, encoded: EncodedTiles) -> Embedding:
    token_count, hidden_size = encoded.visual_tokens.shape
    info = EmbeddingInfo(
        tile_count=len(picture.tiles),
        token_count=token_count,
        hidden_size=hidden_size,
        data_type=data_type_of(encoded.visual_tokens),
        width=picture.width,
        height=picture.height,
        columns=picture.grid.columns,
        rows=picture.grid.rows,
    )
    return Embedding(digest, info, bytes_of(encoded.visual_tokens))


def _milliseconds(timings: Timings) -> dict[str, float]:
    return {
        "preprocess_ms": round(timings.preprocess_s * 1e3, 1),
        "queue_ms": round(timings.queue_s * 1e3, 1),
        "encode_ms": round(timings.encode_s * 1e3, 1),
    }
