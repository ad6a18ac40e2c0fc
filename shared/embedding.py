"""The embedding of one medium, and the values that hold it in the embedding store.

A stored embedding is one manifest value and one value per group of rows. Every value is a fixed header, then the
group's rows as raw little-endian bytes; a manifest has no rows. The header ends with a keyed BLAKE3 over everything
else in the value, so a value that was damaged, cut, moved to another key or written by somebody else does not verify.
Where no key is set anybody can write values that do, so nothing in a header is used before it has been found plausible.
"""

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
_MAGIC = b"IVLE"
_VERSION = 1
_MAC_BYTES = 32
# magic, version, data type, reserved, tiles, tokens, hidden, width, height, columns, rows, group, groups, digest
_FIELDS = struct.Struct("<4sHBBIIIIIIIII32s")
_HEADER_BYTES = _FIELDS.size + _MAC_BYTES
_MANIFEST = 0xFFFFFFFF
_DATA_TYPES: tuple[DataType, ...] = get_args(DataType)


@dataclass(frozen=True, slots=True)
class EmbeddingInfo:
    """What is known of an embedding without its tensor. Sizes in pixels; `columns` x `rows` is the tile grid."""

    tile_count: int
    token_count: int
    hidden_size: int
    data_type: DataType
    width: int
    height: int
    columns: int
    rows: int

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
        )


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
        return self._seal(embedding.digest, embedding.info, _MANIFEST, memoryview(b""))

    def pack_group(self, embedding: Embedding, index: int) -> bytes:
        """Return the value of one group."""
        rows = memoryview(embedding.payload)[embedding.info.group_slice(index)]
        return self._seal(embedding.digest, embedding.info, index, rows)

    def unpack_manifest(self, digest: str, value: bytes) -> EmbeddingInfo | None:
        """Return what the manifest says, which is plausible, or None if it does not verify."""
        opened = self._open(digest, value, _MANIFEST)
        return opened[0] if opened and not opened[1] else None

    def unpack_group(self, digest: str, info: EmbeddingInfo, index: int, value: bytes, payload: bytearray) -> bool:
        """Copy a group's rows to their place in `payload`, the whole tensor; False, and no copy, if it does not verify.

        Threads may unpack different groups into one payload at a time.
        """
        opened, place = self._open(digest, value, index), info.group_slice(index)
        if opened is None or opened[0] != info or len(opened[1]) != place.stop - place.start:
            return False
        memoryview(payload)[place] = opened[1]
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
            _DATA_TYPES.index(info.data_type),
            0,
            info.tile_count,
            info.token_count,
            info.hidden_size,
            info.width,
            info.height,
            info.columns,
            info.rows,
            group,
            info.group_count,
            bytes.fromhex(digest),
        )
        return b"".join((fields, self._mac(fields, rows), rows))

    def _open(self, digest: str, value: bytes, group: int) -> tuple[EmbeddingInfo, memoryview] | None:
        """Return what a header that is plausible says, and the rows; None, and no error, for anything else."""
        if not isinstance(value, bytes) or len(value) < _HEADER_BYTES:
            return None
        view = memoryview(value)
        fields, mac, rows = view[: _FIELDS.size], view[_FIELDS.size : _HEADER_BYTES], view[_HEADER_BYTES:]
        if self._mac(fields, rows) != bytes(mac):
            return None
        magic, version, data_type, _, *numbers, found_group, groups, found_digest = _FIELDS.unpack(fields)
        if (magic, version, found_group) != (_MAGIC, _VERSION, group) or found_digest.hex() != digest:
            return None
        if data_type >= len(_DATA_TYPES):
            return None
        tiles, tokens, hidden, width, height, columns, grid_rows = numbers
        info = EmbeddingInfo(tiles, tokens, hidden, _DATA_TYPES[data_type], width, height, columns, grid_rows)
        return (info, rows) if info.plausible() and groups == info.group_count else None

    def _mac(self, fields: bytes | memoryview, rows: memoryview) -> bytes:
        # The MAC is compared with `!=`: a cache writer who could time us over the network gains nothing by it.
        return blake3(fields, key=self._key).update(rows).digest()
