"""The values that hold an embedding in the embedding store.

A stored embedding is one manifest value and one value per group of rows. Every value is a fixed header, then the
group's rows as raw little-endian bytes; a manifest has the frames of a video there, and nothing for a picture. The
header ends with a keyed BLAKE3 over everything else in the value, so a value that was damaged, cut, moved to another
key or written by somebody else does not verify.
Where no key is set anybody can write values that do, so nothing in a header is used before it has been found plausible.
"""

import struct
from dataclasses import dataclass
from typing import Final, get_args

from blake3 import blake3

from shared.embedding import MAX_TILES, DataType, EmbeddingInfo, VideoFrame
from shared.stored_name import StoredName

_MAGIC = b"IVLE"
_VERSION = 3
_MAC_BYTES = 32
# magic, version, data type, 0, tiles, tokens, hidden, width, height, columns, rows, frames, group, groups,
# digest, media digest, tenant tag
_FIELDS = struct.Struct("<4sHBBIIIIIIIIII32s32s16s")
_FRAME = struct.Struct("<Id")
_MANIFEST = 0xFFFFFFFF
_DATA_TYPES: tuple[DataType, ...] = get_args(DataType)

HEADER_BYTES: Final = _FIELDS.size + _MAC_BYTES  # what stands before the rows in every value
Bytes = bytes | bytearray | memoryview


class EmbeddingFormat:
    """Packs embeddings into stored values and back. `key` authenticates them; readers and writers share it."""

    def __init__(self, key: str) -> None:
        self._key = blake3(key.encode(), derive_key_context="internvl-serving embedding values v1").digest()

    def manifest(self, name: StoredName, info: EmbeddingInfo) -> bytes:
        """Return the manifest value."""
        frames = b"".join(_FRAME.pack(frame.index, frame.time_s) for frame in info.frames)
        return self._header(name, info, _MANIFEST, frames) + frames

    def group_header(self, name: StoredName, info: EmbeddingInfo, index: int, rows: Bytes) -> bytes:
        """Return what stands before the rows of a group in its value."""
        return self._header(name, info, index, rows)

    def read_manifest(self, name: StoredName, value: object) -> EmbeddingInfo | None:
        """Return what a manifest says, which is plausible; None if it does not verify, whatever it is."""
        if not isinstance(value, Bytes) or len(value) < HEADER_BYTES:
            return None
        header, frames = memoryview(value)[:HEADER_BYTES], memoryview(value)[HEADER_BYTES:]
        opened = self._open(name, header, frames, _MANIFEST)
        return opened.info(frames) if opened else None

    def verify_group(self, name: StoredName, info: EmbeddingInfo, index: int, header: Bytes, rows: Bytes) -> bool:
        """Return whether a value's header and rows are those of one group of the embedding that `info` describes."""
        place = info.group_slice(index)
        if len(rows) != place.stop - place.start:
            return False
        opened = self._open(name, header, rows, index)
        return opened is not None and (opened.shape, opened.group_count) == (_shape_of(info), info.group_count)

    def _header(self, name: StoredName, info: EmbeddingInfo, group: int, content: Bytes) -> bytes:
        fields = _FIELDS.pack(_MAGIC, _VERSION, *_shape_of(info), group, info.group_count, *_bytes_of(name))
        return fields + self._mac(fields, content)

    def _open(self, name: StoredName, header: Bytes, content: Bytes, group: int) -> "_Opened | None":
        """Return what a header that verifies and is of this place says; None, and no error, for anything else."""
        if len(header) != HEADER_BYTES:
            return None
        fields, mac = header[: _FIELDS.size], header[_FIELDS.size :]
        if self._mac(fields, content) != bytes(mac):
            return None
        magic, version, *shape, found_group, group_count, digest, media_digest, tag = _FIELDS.unpack(fields)
        if (magic, version, found_group, (digest, media_digest, tag)) != (_MAGIC, _VERSION, group, _bytes_of(name)):
            return None
        return _Opened(tuple(shape), group_count)

    def _mac(self, fields: Bytes, content: Bytes) -> bytes:
        # The MAC is compared with `!=`: a cache writer who could time us over the network gains nothing by it.
        return blake3(fields, key=self._key).update(content).digest()


@dataclass(frozen=True, slots=True)
class _Opened:
    """What a header says that verifies; whether it makes sense is not known yet."""

    shape: tuple[int, ...]
    group_count: int

    def info(self, frames: memoryview) -> EmbeddingInfo | None:
        """Return what a manifest says, or None where it is not plausible."""
        data_type, _, tiles, tokens, hidden_size, width, height, columns, rows, frame_count = self.shape
        if data_type >= len(_DATA_TYPES) or frame_count > MAX_TILES or len(frames) != frame_count * _FRAME.size:
            return None
        seen = tuple(VideoFrame(*fields) for fields in _FRAME.iter_unpack(frames))
        name = _DATA_TYPES[data_type]
        info = EmbeddingInfo(tiles, tokens, hidden_size, name, width, height, columns, rows, seen)
        return info if info.plausible() and self.group_count == info.group_count else None


def _bytes_of(name: StoredName) -> tuple[bytes, bytes, bytes]:
    return bytes.fromhex(name.digest), bytes.fromhex(name.media_digest), bytes.fromhex(name.tenant_tag)


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
