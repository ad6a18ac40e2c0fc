"""The embedding of one medium: whose it is, what is known of it, and its tensor as raw bytes."""

import math
from dataclasses import dataclass
from typing import Literal

from shared.stored_name import StoredName, tenant_tag_of

# A row of `int8_rows` is `hidden_size` signed bytes, then the little-endian float32 that they are multiples of.
DataType = Literal["float32", "float16", "bfloat16", "int8_rows"]
ITEM_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8_rows": 1}
SCALE_BYTES = 4

MAX_GROUP_BYTES = 2 << 20
# Far above what the models make (40 tiles and a thumbnail of the largest, in float32, are 344 MB), and low enough that
# a forged header cannot ask for more memory than a process has.
MAX_TILES = 4096
MAX_TOKENS = 1 << 22
MAX_HIDDEN_SIZE = 1 << 16
MAX_SIDE = 1 << 31  # pixels
MAX_SIZE_BYTES = 1 << 30
MAX_FRAME_INDEX = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class VideoFrame:
    """A frame of a video that was seen: its number in the video, and seconds from the first frame to it."""

    index: int
    time_s: float

    def plausible(self) -> bool:
        """Return whether the numbers are within bounds."""
        return 0 <= self.index <= MAX_FRAME_INDEX and 0 <= self.time_s < math.inf


@dataclass(frozen=True, slots=True)
class EmbeddingInfo:
    """What is known of an embedding without its tensor. Sizes in pixels; `columns` x `rows` is the tile grid.

    `frames` are a video's, in order; all of them have the same grid and equally many tokens. A picture has none.
    """

    tile_count: int
    token_count: int
    hidden_size: int
    data_type: DataType
    width: int
    height: int
    columns: int
    rows: int
    frames: tuple[VideoFrame, ...] = ()

    @property
    def frame_count(self) -> int:
        """Frames of a video; 0 for a picture."""
        return len(self.frames)

    @property
    def row_bytes(self) -> int:
        """Bytes of one visual token."""
        return row_bytes_of(self.hidden_size, self.data_type)

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.token_count * self.row_bytes

    @property
    def group_bytes(self) -> int:
        """Bytes of every stored group but the last: whole tiles where one fits into 2 MiB, else whole rows."""
        tile_bytes = self.size_bytes // self.tile_count
        unit = tile_bytes if tile_bytes <= MAX_GROUP_BYTES else self.row_bytes
        return max(1, MAX_GROUP_BYTES // unit) * unit

    @property
    def group_count(self) -> int:
        """Number of stored groups."""
        return -(-self.size_bytes // self.group_bytes)

    def group_slice(self, index: int) -> slice:
        """Return which bytes of the tensor a group holds."""
        return slice(index * self.group_bytes, min((index + 1) * self.group_bytes, self.size_bytes))

    def plausible(self) -> bool:
        """Return whether the numbers are within bounds and fit together; the rest may be asked for only then."""
        return (
            self.data_type in ITEM_BYTES
            and 0 < self.tile_count <= MAX_TILES
            and 0 < self.token_count <= MAX_TOKENS
            and 0 < self.hidden_size <= MAX_HIDDEN_SIZE
            and 0 < min(self.width, self.height) <= max(self.width, self.height) <= MAX_SIDE
            and 0 < min(self.columns, self.rows) <= max(self.columns, self.rows) <= MAX_TILES
            and self.token_count % self.tile_count == 0
            and self.size_bytes <= MAX_SIZE_BYTES
            and self.tile_count % max(1, self.frame_count) == 0
            and all(frame.plausible() for frame in self.frames)
        )


def row_bytes_of(hidden_size: int, data_type: DataType) -> int:
    """Return the bytes of one visual token."""
    return hidden_size * ITEM_BYTES[data_type] + (SCALE_BYTES if data_type == "int8_rows" else 0)


def max_tiles(tokens_per_tile: int, hidden_size: int, data_type: DataType, max_bytes: int = MAX_SIZE_BYTES) -> int:
    """Return how many tiles an embedding can have that is plausible and takes at most `max_bytes`; 0 is none."""
    row_bytes = row_bytes_of(hidden_size, data_type)
    most_tokens = min(MAX_TOKENS, min(max_bytes, MAX_SIZE_BYTES) // row_bytes)
    return min(MAX_TILES, most_tokens // tokens_per_tile)


@dataclass(frozen=True, slots=True)
class EmbeddingKey:
    """Which embedding: its digest, and whose medium it was made from. `tenant` empty: everybody's."""

    digest: str
    media_digest: str
    tenant: str = ""

    @property
    def name(self) -> StoredName:
        """What the embedding is called in the store."""
        return StoredName(tenant_tag_of(self.tenant), self.media_digest, self.digest)


@dataclass(frozen=True, slots=True)
class Embedding:
    """The tensor [token_count, hidden_size] of one medium, as raw row-major little-endian bytes.

    `payload` is one run of bytes: read it through `memoryview`, and do not write to it.
    """

    key: EmbeddingKey
    info: EmbeddingInfo
    payload: bytes | bytearray | memoryview

    def __post_init__(self) -> None:
        assert len(self.payload) == self.info.size_bytes

    @property
    def digest(self) -> str:
        """SHA-256 of everything that decides the value."""
        return self.key.digest
