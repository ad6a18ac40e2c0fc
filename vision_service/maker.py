"""Makes embeddings: a medium's bytes become tiles, the tower's visual tokens, and the bytes that are kept."""

import time
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from shared import tracing
from shared.digest import digest_of_fields
from shared.embedding import DataType, Embedding, EmbeddingInfo, EmbeddingKey, max_tiles
from shared.errors import MediaTooLarge
from shared.tensors import bytes_of, data_type_of, pack_rows
from vision_service.batcher import Deadline, EncodedTiles
from vision_service.encoded import Timings, Wanted
from vision_service.preparer import MediaSpec
from vision_service.preprocess.image import Picture, Tiles
from vision_service.runner import TowerIdentity, WorkerPool

_SCHEMA: Final = "internvl-serving embedding v2"
# How rows are kept: "plain" as the tower gives them, "int8" in a little over half the bytes of 16-bit ones, nearly so.
Storage = Literal["plain", "int8"]


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
class Made:
    """A new embedding and what it cost."""

    embedding: Embedding
    timings: Timings


class EmbeddingMaker:
    """Makes embeddings; keeps none. One event loop only."""

    def __init__(
        self, tower: Tower, preparer: Preparer, workers: WorkerPool, limits: EmbeddingLimits, storage: Storage = "plain"
    ) -> None:
        self._tower = tower
        self._preparer = preparer
        self._workers = workers
        self._limits = limits
        self._storage = storage

    def key_of(self, media_digest: str, spec: MediaSpec, tenant: str) -> EmbeddingKey:
        """Return what names the embedding; its digest is the SHA-256 of everything that decides the value."""
        identity = self._tower.identity
        kept = identity.data_type if self._storage == "plain" else f"{identity.data_type} as {self._storage}"
        medium = kept, tenant, bytes.fromhex(media_digest)
        digest = digest_of_fields(_SCHEMA, identity.fingerprint, *spec.identity, *medium)
        return EmbeddingKey(digest, media_digest, tenant)

    async def make(self, wanted: Wanted, content: bytes, deadline: Deadline) -> Made:
        """Return the embedding of a medium's bytes.

        Raises what the preparer raises, `MediaTooLarge` for one that no cache could keep, and what the tower raises.
        """
        started = time.monotonic()
        picture = await self._preparer.prepare(content, wanted.spec, deadline)
        del content  # of no more use, and large
        preprocess_s = time.monotonic() - started
        self._limits.check(len(picture.tiles), self._data_type)
        encoded = await self._tower.encode(picture.tiles, deadline)
        _trace(started, preprocess_s, encoded, len(picture.tiles))
        embedding = await self._workers.run(self._packed, wanted.key, picture, encoded)
        return Made(embedding, Timings(preprocess_s, encoded.queue_s, encoded.encode_s))

    @property
    def _data_type(self) -> DataType:
        return self._tower.identity.data_type if self._storage == "plain" else "int8_rows"

    def _packed(self, key: EmbeddingKey, picture: Picture, encoded: EncodedTiles) -> Embedding:
        pieces = list(encoded.pieces)
        info = EmbeddingInfo(
            tile_count=len(picture.tiles),
            token_count=sum(len(piece) for piece in pieces),
            hidden_size=pieces[0].shape[1],
            data_type=data_type_of(pieces[0]) if self._storage == "plain" else "int8_rows",
            width=picture.width,
            height=picture.height,
            columns=picture.grid.columns,
            rows=picture.grid.rows,
            frames=picture.frames,
        )
        rows = pieces if self._storage == "plain" else [pack_rows(piece) for piece in pieces]
        return Embedding(key, info, bytes_of(*rows))


def _trace(began_at: float, preprocess_s: float, encoded: EncodedTiles, tiles: int) -> None:
    prepared_at = began_at + preprocess_s
    begun_at = prepared_at + encoded.queue_s
    tracing.record("preprocess", began_at, prepared_at, {"internvl.tiles": tiles})
    tracing.record("queue", prepared_at, begun_at, {})
    tracing.record("encode", begun_at, begun_at + encoded.encode_s, {"internvl.tiles": tiles})
