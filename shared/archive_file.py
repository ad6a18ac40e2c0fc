"""The file of an embedding archive: safetensors, a tensor per embedding, and what is known of each as its metadata."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from blake3 import blake3
from pydantic import TypeAdapter

from shared.embedding import DataType, EmbeddingInfo
from shared.embedding_values import Bytes
from shared.stored_name import StoredName

_MAX_HEADER_BYTES: Final = 100_000_000  # what readers of safetensors accept
_FORMAT: Final = "internvl-serving embeddings v1"
_NAME: Final = re.compile(r"([0-9a-f]{32})/([0-9a-f]{64})/([0-9a-f]{64})")
_DTYPES: Final[dict[DataType, str]] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8_rows": "U8"}
_NO_CHECKSUM: Final = "0" * 64


class ArchiveDamaged(Exception):
    """A file is no archive of embeddings, or not as it was written. The message is for who runs the tool."""


@dataclass(frozen=True, slots=True)
class _Described:
    """What the metadata says of an embedding."""

    info: EmbeddingInfo
    blake3: str


_DESCRIBED: Final = TypeAdapter(_Described)


@dataclass(frozen=True, slots=True)
class ArchivedEmbedding:
    """An embedding in a file. `begin` is where in the file its bytes lie."""

    name: StoredName
    info: EmbeddingInfo
    checksum: str
    begin: int

    def read(self, stream: BinaryIO) -> memoryview:
        """Return the tensor's bytes; raise `ArchiveDamaged` where they are not those that were written."""
        payload = np.empty(self.info.size_bytes, np.uint8).data
        stream.seek(self.begin)
        if stream.readinto(payload) != len(payload) or blake3(payload).hexdigest() != self.checksum:  # type: ignore[attr-defined]  # every binary file has it
            raise ArchiveDamaged(f"embedding {self.name.digest} is damaged.")
        return payload


class ArchiveWriter:
    """Writes an archive, embedding by embedding. It appears under its name when it is complete, and not before."""

    def __init__(self, stream: BinaryIO, expected: Sequence[tuple[StoredName, EmbeddingInfo]]) -> None:
        """Leave room for a header that lists everything that is `expected`; nothing else may be added."""
        self._stream = stream
        self._written: list[ArchivedEmbedding] = []
        size = sum(info.size_bytes for _, info in expected)
        most = len(_header([ArchivedEmbedding(name, info, _NO_CHECKSUM, size) for name, info in expected]))
        self._header_bytes = -(-most // 8) * 8
        if self._header_bytes > _MAX_HEADER_BYTES:
            raise ArchiveDamaged(f"{len(expected)} embeddings are too many for one file; export tenant by tenant.")
        self._end = 0
        stream.seek(8 + self._header_bytes)

    def add(self, name: StoredName, info: EmbeddingInfo, payload: Bytes) -> None:
        """Write one embedding."""
        self._stream.write(payload)
        self._written.append(ArchivedEmbedding(name, info, blake3(payload).hexdigest(), self._end))
        self._end += info.size_bytes

    def finish(self) -> None:
        """Write the header, and have everything on the disk."""
        self._stream.seek(0)
        self._stream.write(self._header_bytes.to_bytes(8, "little"))
        self._stream.write(_header(self._written).ljust(self._header_bytes))
        self._stream.flush()
        os.fsync(self._stream.fileno())


@contextmanager
def writing(file: Path, expected: Sequence[tuple[StoredName, EmbeddingInfo]]) -> Iterator[ArchiveWriter]:
    """Yield a writer of `file`, which is replaced at the end, and left as it is where the block raises."""
    part = file.with_name(file.name + ".part")
    try:
        with part.open("wb") as stream:
            writer = ArchiveWriter(stream, expected)
            yield writer
            writer.finish()
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def read_contents(stream: BinaryIO) -> list[ArchivedEmbedding]:
    """Return what an archive holds, in the order of its bytes; raise `ArchiveDamaged` where it is none."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    header_bytes = int.from_bytes(stream.read(8), "little")
    if not 0 < header_bytes <= min(_MAX_HEADER_BYTES, size - 8):
        raise ArchiveDamaged("the file is no safetensors file, or is cut short.")
    try:
        header = json.loads(stream.read(header_bytes))
        metadata = header.pop("__metadata__")
        if metadata["format"] != _FORMAT:
            raise ArchiveDamaged("the file holds no embeddings of this version.")
        found = [_archived(name, stored, metadata[name], 8 + header_bytes) for name, stored in header.items()]
    except (AttributeError, KeyError, TypeError, ValueError):  # a ValidationError is a ValueError
        raise ArchiveDamaged("the file's header is damaged, or holds something else than embeddings.") from None
    if any(entry.begin + entry.info.size_bytes > size for entry in found):
        raise ArchiveDamaged("the file is cut short.")
    return sorted(found, key=lambda entry: entry.begin)


def _archived(name: str, stored: dict[str, Any], described: str, data_begin: int) -> ArchivedEmbedding:
    match, known = _NAME.fullmatch(name), _DESCRIBED.validate_json(described, strict=False)
    if match is None or not known.info.plausible():
        raise ValueError(name)
    begin, end = stored["data_offsets"]
    if (stored["dtype"], stored["shape"]) != (_DTYPES[known.info.data_type], _shape_of(known.info)):
        raise ValueError(name)
    if not begin >= 0 or end - begin != known.info.size_bytes:
        raise ValueError(name)
    return ArchivedEmbedding(StoredName(*match.groups()), known.info, known.blake3, data_begin + begin)


def _header(entries: Sequence[ArchivedEmbedding]) -> bytes:
    """Return the header for embeddings whose `begin` counts from the first byte of data."""
    metadata, tensors = {"format": _FORMAT}, {}
    for entry in entries:
        name = f"{entry.name.tenant_tag}/{entry.name.media_digest}/{entry.name.digest}"
        metadata[name] = json.dumps(asdict(_Described(entry.info, entry.checksum)), separators=(",", ":"))
        tensors[name] = {
            "dtype": _DTYPES[entry.info.data_type],
            "shape": _shape_of(entry.info),
            "data_offsets": [entry.begin, entry.begin + entry.info.size_bytes],
        }
    return json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":")).encode()


def _shape_of(info: EmbeddingInfo) -> list[int]:
    return [info.token_count, info.row_bytes if info.data_type == "int8_rows" else info.hidden_size]
