"""Asks for one medium over an open connection and takes it in, piece by piece, as long as it keeps the rules."""

import asyncio
import time
from collections.abc import Mapping
from typing import Final

import h11

from gateway.remote.connection import Streams
from gateway.remote.limits import FetchLimits
from gateway.remote.refusals import too_large, too_slow, unsuitable
from gateway.remote.url import RemoteUrl

_READ_BYTES: Final = 64 << 10
_MAX_HEAD_BYTES: Final = 32 << 10
_MAX_INTERIM_RESPONSES: Final = 4
_FREE_PIECES: Final = 1024
_MIN_PIECE_BYTES: Final = 256  # on average, after the free ones: each costs the event loop some time
_OK: Final = 200
_REDIRECTS: Final = range(300, 400)


async def download(streams: Streams, url: RemoteUrl, limits: FetchLimits) -> bytes:
    """Return the body of the answer to one GET; raise `Refused` for what is not a picture or video within limits."""
    reader, writer = streams
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)
    try:
        writer.write(_request(connection, url))
        async with asyncio.timeout(limits.stall_s):
            await writer.drain()
        events = _Events(connection, reader, limits.stall_s)
        _check_head(await events.response(), limits.max_bytes)
        return await _body(events, limits)
    except h11.RemoteProtocolError as error:
        raise unsuitable("What this URL leads to is not sent as HTTP asks for.", "broken HTTP") from error
    except TimeoutError as error:
        raise too_slow("stalled") from error
    except OSError as error:
        raise unsuitable("What this URL leads to broke off.", "connection lost") from error


class _Events:
    """What comes over the connection, as events of HTTP."""

    def __init__(self, connection: h11.Connection, reader: asyncio.StreamReader, stall_s: float) -> None:
        self._connection = connection
        self._reader = reader
        self._stall_s = stall_s

    async def response(self) -> h11.Response:
        """Return the head of the answer."""
        for _ in range(_MAX_INTERIM_RESPONSES):
            event = await self._next()
            if isinstance(event, h11.Response):
                return event
        raise unsuitable("What this URL leads to is not sent as HTTP asks for.", "no response")

    async def data(self) -> bytes | None:
        """Return the next piece of the body, at most what one read brings; None at its end."""
        event = await self._next()
        return bytes(event.data) if isinstance(event, h11.Data) else None

    async def _next(self) -> object:
        while (event := self._connection.next_event()) is h11.NEED_DATA:
            async with asyncio.timeout(self._stall_s):
                self._connection.receive_data(await self._reader.read(_READ_BYTES))
        return event


async def _body(events: _Events, limits: FetchLimits) -> bytes:
    started = time.monotonic()
    pieces: list[bytes] = []
    received_bytes = 0
    while (piece := await events.data()) is not None:
        pieces.append(piece)
        received_bytes += len(piece)
        if received_bytes > limits.max_bytes:
            raise too_large(limits.max_bytes)
        if limits.is_too_slow(received_bytes, time.monotonic() - started):
            raise too_slow("below the least rate")
        if len(pieces) > _FREE_PIECES and received_bytes < _MIN_PIECE_BYTES * len(pieces):
            raise unsuitable("What this URL leads to comes in too small pieces.", "tiny pieces")
    if not received_bytes:
        raise unsuitable("This URL leads to nothing.", "empty body")
    return b"".join(pieces)


def _request(connection: h11.Connection, url: RemoteUrl) -> bytes:
    """Return the request. It carries nothing of ours or of the client's: no cookie, no key, no referrer."""
    headers = [
        ("Host", url.authority),
        ("User-Agent", "internvl-serving"),
        ("Accept", "image/*, video/*"),
        ("Accept-Encoding", "identity"),
        ("Connection", "close"),
    ]
    head = connection.send(h11.Request(method="GET", target=url.target, headers=headers))
    return (head or b"") + (connection.send(h11.EndOfMessage()) or b"")


def _check_head(response: h11.Response, max_bytes: int) -> None:
    status, headers = response.status_code, _headers(response)
    if status in _REDIRECTS:
        raise unsuitable(f"This URL leads on to another (status {status}); give that one.", "redirect")
    if status != _OK:
        raise unsuitable(f"The host of this URL answered with status {status}.", "status")
    if headers.get("content-encoding", "identity") != "identity":
        raise unsuitable("What this URL leads to is compressed, though that was not asked for.", "content encoding")
    if not headers.get("content-type", "").startswith(("image/", "video/")):
        raise unsuitable("What this URL leads to does not call itself a picture or a video.", "content type")
    if int(headers.get("content-length", "0")) > max_bytes:  # h11 has checked that it is a number
        raise too_large(max_bytes)


def _headers(response: h11.Response) -> Mapping[str, str]:
    """Return the headers by name, all values of a name as one, in lower case."""
    headers: dict[str, str] = {}
    for name, value in response.headers:
        key, text = name.decode("latin-1").lower(), value.decode("latin-1").strip().lower()
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    return headers
