"""The embedding of one medium, and the values that hold it in the embedding store.

A stored embedding is one manifest value and one value per group of rows. Every value is a fixed header, then the
group's rows as raw little-endian bytes; a manifest has the frames of a video there, and nothing for a picture. The
header ends with a keyed BLAKE3 over everything else in the value, so a value that was damaged, cut, moved to another
key or written by somebody else does not verify.
Where no key is set anybody can write values that do, so nothing in a header is used before it has been found plausible.
"""

import math
import struct
from dataclasses import dataclass
from typing import Literal, get_args

from blake3 import blake3

DataType = Literal["float32", "float16", "bfloat16"]
ITEM_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

MAX_GROUP_BYTES = 2 << 20
# Far above what the models make (40 tiles and a thumbnail of the largest, in float32, are 344 MB), and low enough that
# a forged header cannot ask for more memory than a process has.
MAX_TILES = 4096
MAX_TOKENS = 1 << 22
MAX_HIDDEN_SIZE = 1 << 16
MAX_SIDE = 1 << 31  # pixels
MAX_SIZE_BYTES = 1 << 30
MAX_FRAME_INDEX = (1 << 31) - 1
_MAGIC = b"IVLE"
_VERSION = 2
_MAC_BYTES = 32
# magic, version, data type, 0, tiles, tokens, hidden, width, height, columns, rows, frames, group, groups, digest
_FIELDS = struct.Struct("<4sHBBIIIIIIIIII32s")
_FRAME = struct.Struct("<Id")
_HEADER_BYTES = _FIELDS.size + _MAC_BYTES
_MANIFEST = 0xFFFFFFFF
_DATA_TYPES: tuple[DataType, ...] = get_args(DataType)


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
        return self.hidden_size * ITEM_BYTES[self.data_type]

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


def max_tiles(tokens_per_tile: int, hidden_size: int, data_type: DataType, max_bytes: int = MAX_SIZE_BYTES) -> int:
    """Return how many tiles an embedding can have that is plausible and takes at most `max_bytes`; 0 is none."""
    row_bytes = hidden_size * ITEM_BYTES[data_type]
    most_tokens = min(MAX_TOKENS, min(max_bytes, MAX_SIZE_BYTES) // row_bytes)
    return min(MAX_TILES, most_tokens // tokens_per_tile)


@dataclass(frozen=True, slots=True)
class Embedding:
    """The tensor [token_count, hidden_size] of one medium, as raw row-major little-endian bytes."""

    digest: str
    info: EmbeddingInfo
    payload: bytes | bytearray | memoryview

    def __post_init__(self) -> None:
        assert len(self.payload) == self.info.size_bytes


class EmbeddingFormat:
    """Packs embeddings into stored values and back. `key` authenticates them; readers and writers share it."""

    def __init__(self, key: str) -> None:
        self._key = blake3(key.encode(), derive_key_context="internvl-serving embedding values v1").digest()

    def pack(self, embedding: Embedding) -> tuple[bytes, list[bytes]]:
        """Return the manifest value and the group values."""
        groups = [self.pack_group(embedding, index) for index in range(embedding.info.group_count)]
        return self.pack_manifest(embedding), groups

    def pack_manifest(self, embedding: Embedding) -> bytes:
        """Return the manifest value."""
        frames = b"".join(_FRAME.pack(frame.index, frame.time_s) for frame in embedding.info.frames)
        return self._seal(embedding.digest, embedding.info, _MANIFEST, memoryview(frames))

    def pack_group(self, embedding: Embedding, index: int) -> bytes:
        """Return the value of one group."""
        rows = memoryview(embedding.payload)[embedding.info.group_slice(index)]
        return self._seal(embedding.digest, embedding.info, index, rows)

    def unpack_manifest(self, digest: str, value: bytes) -> EmbeddingInfo | None:
        """Return what the manifest says, which is plausible, or None if it does not verify."""
        opened = self._open(digest, value, _MANIFEST)
        return opened.info() if opened else None

    def unpack_group(self, digest: str, info: EmbeddingInfo, index: int, value: bytes, payload: bytearray) -> bool:
        """Copy a group's rows to their place in `payload`, the whole tensor; False, and no copy, if it does not verify.

        Threads may unpack different groups into one payload at a time.
        """
        opened, place = self._open(digest, value, index), info.group_slice(index)
        if opened is None or (opened.shape, opened.group_count) != (_shape_of(info), info.group_count):
            return False
        if len(opened.content) != place.stop - place.start:
            return False
        memoryview(payload)[place] = opened.content
        return True

    def unpack(self, digest: str, info: EmbeddingInfo, values: list[bytes]) -> Embedding | None:
        """Return the embedding that the group values hold, or None if any does not verify."""
        if len(values) != info.group_count:
            return None
        payload = bytearray(info.size_bytes)
        verified = all(self.unpack_group(digest, info, index, value, payload) for index, value in enumerate(values))
        return Embedding(digest, info, payload) if verified else None

    def _seal(self, digest: str, info: EmbeddingInfo, group: int, rows: memoryview) -> bytes:
        fields = _FIELDS.pack(
            _MAGIC,
            _VERSION,
            *_shape_of(info),
            group,
            info.group_count,
            bytes.fromhex(digest),
        )
        return b"".join((fields, self._mac(fields, rows), rows))

    def _open(self, digest: str, value: bytes, group: int) -> "_Opened | None":
        """Return what a value that verifies and is of this place holds; None, and no error, for anything else."""
        if not isinstance(value, bytes) or len(value) < _HEADER_BYTES:
            return None
        view = memoryview(value)
        fields, mac, rows = view[: _FIELDS.size], view[_FIELDS.size : _HEADER_BYTES], view[_HEADER_BYTES:]
        if self._mac(fields, rows) != bytes(mac):
            return None
        magic, version, *shape, found_group, group_count, found_digest = _FIELDS.unpack(fields)
        if (magic, version, found_group) != (_MAGIC, _VERSION, group) or found_digest.hex() != digest:
            return None
        return _Opened(tuple(shape), group_count, rows)

    def _mac(self, fields: bytes | memoryview, rows: memoryview) -> bytes:
        # The MAC is compared with `!=`: a cache writer who could time us over the network gains nothing by it.
        return blake3(fields, key=self._key).update(rows).digest()


@dataclass(frozen=True, slots=True)
class _Opened:
    """What a value holds that verifies; whether it makes sense is not known yet."""

    shape: tuple[int, ...]
    group_count: int
    content: memoryview

    def info(self) -> EmbeddingInfo | None:
        """Return what a manifest says, or None where it is not plausible."""
        data_type, _, tiles, tokens, hidden_size, width, height, columns, rows, frame_count = self.shape
        if data_type >= len(_DATA_TYPES) or frame_count > MAX_TILES:
            return None
        if len(self.content) != frame_count * _FRAME.size:
            return None
        frames = tuple(VideoFrame(*fields) for fields in _FRAME.iter_unpack(self.content))
        name = _DATA_TYPES[data_type]
        info = EmbeddingInfo(tiles, tokens, hidden_size, name, width, height, columns, rows, frames)
        return info if info.plausible() and self.group_count == info.group_count else None


def _shape_of(info: EmbeddingInfo) -> tuple[int, ...]:
    """Return the fields of the header that are the same in every value of an embedding."""
    return (
        _DATA_TYPES.index(info.data_type),
        0,
        info.tile_count,
        info.token_count,
        info.hidden_size,
        info.width,
        info.height,
        info.columns,
        info.rows,
        info.frame_count,
    )
