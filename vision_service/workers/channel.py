"""What the service and its workers say to one another: a line of JSON and bytes, both behind their lengths.

JSON and not pickle: a worker that a medium has taken over can then only lie.
"""

import json
import socket
import struct
import time
from typing import Any, Final

import numpy as np

_LENGTHS: Final = struct.Struct("<IQ")
_MAX_HEADER_BYTES: Final = 1 << 20
_MAX_CONTENT_BYTES: Final = 1 << 32
_BUFFER_BYTES: Final = 1 << 20

Header = dict[str, Any]


def channel_pair() -> "tuple[Channel, socket.socket]":
    """Return a channel and the socket at its other end, which is for another process."""
    near, far = socket.socketpair()
    for end in (near, far):  # so that a picture's bytes take few turns; measured against pipes and shared memory
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    return Channel(near), far


class Channel:
    """One end of a Unix socket that carries messages. For one thread at a time.

    Deadlines are times of the monotonic clock; `TimeoutError` is raised once one has passed.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    def send(self, header: Header, content: bytes | memoryview = b"", deadline: float | None = None) -> None:
        """Send one message; raises `OSError` where nobody reads."""
        encoded = json.dumps(header).encode()
        for part in (_LENGTHS.pack(len(encoded), len(content)) + encoded, content):
            self._socket.settimeout(_remaining_s(deadline))
            self._socket.sendall(part)

    def receive(self, deadline: float | None = None) -> tuple[Header, memoryview]:
        """Return the next message; raises `EOFError` where the sender has gone, `ValueError` for what is no message."""
        header_bytes, content_bytes = _LENGTHS.unpack(self._read(_LENGTHS.size, deadline))
        if header_bytes > _MAX_HEADER_BYTES or content_bytes > _MAX_CONTENT_BYTES:
            raise ValueError("a message of an impossible length")
        header = _header_of(bytes(self._read(header_bytes, deadline)))
        return header, self._read(content_bytes, deadline)

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _read(self, size: int, deadline: float | None) -> memoryview:
        # Not a bytearray: that would be filled with zeros first.
        view, position = np.empty(size, np.uint8).data, 0
        while position < size:
            self._socket.settimeout(_remaining_s(deadline))
            count = self._socket.recv_into(view[position:], flags=socket.MSG_WAITALL)
            if not count:
                raise EOFError
            position += count
        return view


def _remaining_s(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError
    return remaining_s


def _header_of(encoded: bytes) -> Header:
    try:
        header = json.loads(encoded)
    except RecursionError:
        raise ValueError("a message that is too deep") from None
    if not isinstance(header, dict):
        raise ValueError("a message that is no object")
    return header
