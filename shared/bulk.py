"""Blocking connections to Redis for large values, which go straight to and from the memory where they belong.

redis-py reads a value into a buffer of its own, then into a `bytes`, and joins what it writes: copies into fresh
memory, most of them while no other thread of Python can run. Here the kernel's copy is the only one.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final, Protocol

from redis import ConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

Bytes = bytes | bytearray | memoryview
_BUFFER_BYTES: Final = 64 << 10
_MAX_LINE_BYTES: Final = 1 << 10
# How refusals begin of a server that serves nobody, or not yet. After any other the server lives.
_AWAY: Final = (b"-LOADING", b"-NOAUTH", b"-WRONGPASS", b"-MASTERDOWN", b"-CLUSTERDOWN", b"-ERR max number of clients")


class StoreAway(Exception):
    """The server cannot be reached, does not answer in time, serves nobody, or answers nonsense."""


class StoreRefused(Exception):
    """The server refuses what was asked, and lives."""


class Stream(Protocol):
    """A socket, plain or encrypted."""

    def settimeout(self, value: float | None, /) -> None:
        """Bound each of the calls below."""

    def recv_into(self, buffer: memoryview, /) -> int:
        """Receive some bytes; 0 is the end."""

    def sendall(self, data: Bytes, /) -> None:
        """Send all."""

    def close(self) -> None:
        """Close."""


class BulkConnection:
    """One connection, for one thread at a time. Commands are answered in order; several may be on their way.

    A `deadline` is a time of `time.monotonic`. Every method but `close` raises `StoreAway`.
    """

    def __init__(self, stream: Stream, owner: object = None) -> None:
        """Take over a connected stream; `owner` is kept, because it would close the stream when it is collected."""
        self._stream = stream
        self._owner = owner
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._received = self._buffer[:0]  # and not read yet

    def close(self) -> None:
        """Close the connection."""
        with suppress(OSError):
            self._stream.close()

    def send(self, deadline: float, *words: Bytes, value: Sequence[Bytes] = ()) -> None:
        """Send one command: its words, then one more that is put together from the pieces of `value`."""
        count = len(words) + bool(value)
        head: list[Bytes] = [b"*%d\r\n" % count]
        for word in words:
            head += (b"$%d\r\n" % len(word), word, b"\r\n")
        if value:
            head.append(b"$%d\r\n" % sum(map(len, value)))
        for piece in (b"".join(head), *value, *([b"\r\n"] if value else [])):
            self._send(deadline, piece)

    def read_ok(self, deadline: float) -> None:
        """Read the answer to a command that has no value for one. Raises `StoreRefused`."""
        if self._answer(deadline) != b"+OK":
            raise StoreAway("nonsense")

    def read_size(self, deadline: float) -> int | None:
        """Return the size of the value that is the answer, to be read by `read_into`; None: there is no value.

        Raises `StoreRefused`.
        """
        answer = self._answer(deadline)
        if answer == b"$-1":
            return None
        if not (answer[:1] == b"$" and answer[1:].isdigit()):
            raise StoreAway("nonsense")
        return int(answer[1:])

    def read_into(self, deadline: float, *targets: memoryview) -> None:
        """Read a value that is just as large as the targets together."""
        for target in targets:
            self._fill(deadline, target)
        ending = bytearray(2)
        self._fill(deadline, memoryview(ending))
        if ending != b"\r\n":
            raise StoreAway("nonsense")

    def _answer(self, deadline: float) -> bytes:
        line = self._line(deadline)
        if line.startswith(_AWAY):
            raise StoreAway("serves nobody")
        if line[:1] == b"-":
            raise StoreRefused
        return line

    def _line(self, deadline: float) -> bytes:
        line = b""
        while not line.endswith(b"\r\n"):
            if len(line) > _MAX_LINE_BYTES:
                raise StoreAway("nonsense")
            if not self._received:
                self._refill(deadline)
            received = bytes(self._received[:_MAX_LINE_BYTES])
            taken = received.find(b"\n") + 1 or len(received)
            line += received[:taken]
            self._received = self._received[taken:]
        return line[:-2]

    def _fill(self, deadline: float, target: memoryview) -> None:
        """Fill all of the target; large ones straight from the socket."""
        while target:
            if self._received:
                count = min(len(self._received), len(target))
                target[:count] = self._received[:count]
                self._received = self._received[count:]
                target = target[count:]
            elif len(target) >= _BUFFER_BYTES:
                target = target[self._receive(deadline, target) :]
            else:
                self._refill(deadline)

    def _refill(self, deadline: float) -> None:
        self._received = self._buffer[: self._receive(deadline, self._buffer)]

    def _receive(self, deadline: float, target: memoryview) -> int:
        with self._talking(deadline):
            count = self._stream.recv_into(target)
        if not count:
            raise StoreAway("closed the connection")
        return count

    def _send(self, deadline: float, data: Bytes) -> None:
        with self._talking(deadline):
            self._stream.sendall(data)

    @contextmanager
    def _talking(self, deadline: float) -> Iterator[None]:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise StoreAway("too slow")
        try:
            self._stream.settimeout(left_s)
            yield
        except OSError as error:  # of a time limit, the network or TLS
            raise StoreAway(type(error).__name__) from error


class BulkConnections:
    """Connections to one server that are kept open between uses. Safe to share between threads."""

    def __init__(self, url: str, timeout_s: float) -> None:
        """Take a checked redis://, rediss:// or unix:// URL; `timeout_s` bounds each step of connecting."""
        # redis-py connects: names, TLS, user, database. RESP2, in which nothing is ever said unasked.
        self._pool = ConnectionPool.from_url(
            url,
            protocol=2,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
        )
        self._idle: deque[BulkConnection] = deque()

    @contextmanager
    def connection(self) -> Iterator[BulkConnection]:
        """Lend a connection. Unless the block ends well it is closed, as its state is unknown. Raises `StoreAway`."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)

    def close(self) -> None:
        """Close the connections that are not lent."""
        while self._idle:
            self._idle.pop().close()

    def _connect(self) -> BulkConnection:
        opened = self._pool.connection_class(**self._pool.connection_kwargs)
        try:
            opened.connect()
        except (RedisError, OSError, ValueError) as error:
            raise StoreAway(type(error).__name__) from error
        # The handshake is over and answered, so nothing of the stream is in redis-py's hands any more.
        return BulkConnection(opened._sock, opened)
