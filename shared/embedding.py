"""The embedding of one medium, and the values that hold it in the embedding store.

A stored embedding is one manifest value and one value per group of rows. Every value is a fixed header, then the
group's rows as raw little-endian bytes; a manifest has no rows. The header ends with a keyed BLAKE3 over everything
else in the value, so a value that was damaged, cut, moved to another key or written by somebody else does not verify.
"""

import struct
from dataclasses import dataclass
from itertools import count
from typing import Literal, get_args

from blake3 import blake3

DataType = Literal["float32", "float16", "bfloat16"]
ITEM_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

MAX_GROUP_BYTES = 2 << 20
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

    def plausible(self) -> bool:
        """Return whether the numbers fit together."""
        sizes = (self.tile_count, self.token_count, self.hidden_size, self.width, self.height, self.columns, self.rows)
        return min(sizes) > 0 and self.token_count % self.tile_count == 0


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
        payload, step = memoryview(embedding.payload), embedding.info.group_bytes
        groups = [
            self._seal(embedding.digest, embedding.info, index, payload[start : start + step])
            for index, start in zip(count(), range(0, embedding.info.size_bytes, step), strict=False)
        ]
        return self._seal(embedding.digest, embedding.info, _MANIFEST, memoryview(b"")), groups

    def unpack_manifest(self, digest: str, value: bytes) -> EmbeddingInfo | None:
        """Return what the manifest says, or None if it does not verify."""
        opened = self._open(digest, value, _MANIFEST)
        return opened[0] if opened and not opened[1] else None

    def unpack(self, digest: str, info: EmbeddingInfo, values: list[bytes]) -> Embedding | None:
        """Return the embedding that the group values hold, or None if any does not verify."""
        payload = bytearray(info.size_bytes)
        position = 0
        for index, value in enumerate(values):
            opened = self._open(digest, value, index)
            if opened is None or opened[0] != info or position + len(opened[1]) > info.size_bytes:
                return None
            payload[position : position + len(opened[1])] = opened[1]
            position += len(opened[1])
        return Embedding(digest, info, payload) if position == info.size_bytes else None

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
        if len(value) < _HEADER_BYTES:
            return None
        view = memoryview(value)
        fields, mac, rows = view[: _FIELDS.size], view[_FIELDS.size : _HEADER_BYTES], view[_HEADER_BYTES:]
        if self._mac(fields, rows) != bytes(mac):
            return None
        magic, version, data_type, _, *numbers, found_group, _, found_digest = _FIELDS.unpack(fields)
        if (magic, version, found_group) != (_MAGIC, _VERSION, group) or found_digest.hex() != digest:
            return None
        tiles, tokens, hidden, width, height, columns, grid_rows = numbers
        info = EmbeddingInfo(tiles, tokens, hidden, _DATA_TYPES[data_type], width, height, columns, grid_rows)
        return (info, rows) if info.plausible() else None

    def _mac(self, fields: bytes | memoryview, rows: memoryview) -> bytes:
        # The MAC is compared with `!=`: a cache writer who could time us over the network gains nothing by it.
        return blake3(fields, key=self._key).update(rows).digest()
