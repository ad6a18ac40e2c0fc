"""What the service and its video workers say to one another: a line of JSON and bytes, both behind their lengths.

JSON and not pickle: a worker that a video has taken over can then only lie.
"""

import json
import struct
from typing import Any, BinaryIO

_LENGTHS = struct.Struct("<IQ")
_MAX_HEADER_BYTES = 1 << 20
_MAX_CONTENT_BYTES = 1 << 32

Header = dict[str, Any]


def write_message(stream: BinaryIO, header: Header, content: bytes | memoryview = b"") -> None:
    """Write one message; raises `OSError` where nobody reads."""
    encoded = json.dumps(header).encode()
    stream.write(_LENGTHS.pack(len(encoded), len(content)))
    stream.write(encoded)
    stream.write(content)
    stream.flush()


def read_message(stream: BinaryIO) -> tuple[Header, bytearray]:
    """Return the next message; raises `EOFError` where the writer has gone, `ValueError` for what is no message."""
    header_bytes, content_bytes = _LENGTHS.unpack(_read(stream, _LENGTHS.size))
    if header_bytes > _MAX_HEADER_BYTES or content_bytes > _MAX_CONTENT_BYTES:
        raise ValueError("a message of an impossible length")
    header = json.loads(_read(stream, header_bytes))
    if not isinstance(header, dict):
        raise ValueError("a message that is no object")
    return header, _read(stream, content_bytes)


def _read(stream: BinaryIO, size: int) -> bytearray:
    content = bytearray(size)
    view, position = memoryview(content), 0
    while position < size:
        count = stream.readinto(view[position:])  # type: ignore[attr-defined]  # of every buffered reader
        if not count:
            raise EOFError
        position += count
    return content
