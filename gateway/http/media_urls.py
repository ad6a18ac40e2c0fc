"""What a URL in a message stands for: bytes that it carries, bytes that were sent before, or bytes behind it."""

import asyncio
import binascii
from collections.abc import Collection, Mapping
from typing import Final, Protocol

from shared.digest import checked_digest
from shared.errors import InvalidRequest, MediaUnreadable, RemoteUrlRefused

_DATA: Final = "data:"
_DIGEST: Final = "ivl:sha256:"
_BASE64: Final = ";base64"
_MOST_HEADER_CHARS: Final = 256
# A whole number of base64's groups. Between two pieces other threads get their turn.
_PIECE_CHARS: Final = 1 << 20


class RemoteFetcher(Protocol):
    """Gets what lies behind URLs."""

    async def fetch(self, url: str, field: str) -> bytes:
        """Return the bytes; raise `RemoteUrlRefused` with the request's `field`, or `QueueFull`."""


class NoFetcher:
    """Fetches nothing."""

    async def fetch(self, url: str, field: str) -> bytes:
        """Raise `RemoteUrlRefused`."""
        raise RemoteUrlRefused("URLs are not fetched here; send the bytes as a data: URL.", field=field)


def digest_url(digest: str) -> str:
    """Return the URL that stands for the bytes of a digest."""
    return f"{_DIGEST}{digest}"


def is_remote(url: str) -> bool:
    """Whether the bytes have to be fetched."""
    return not url.startswith((_DATA, _DIGEST))


async def fetched(fetcher: RemoteFetcher, places: Mapping[str, str]) -> dict[str, bytes]:
    """Return what lies behind the URLs in `places`, by URL; the values say where in the request each came in."""
    tasks = {url: asyncio.create_task(fetcher.fetch(url, field)) for url, field in places.items()}
    try:
        return {url: await task for url, task in tasks.items()}
    finally:
        await _ended(tasks.values())


async def _ended(tasks: Collection[asyncio.Task[bytes]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def digest_in(url: str, field: str) -> str | None:
    """Return the digest that the URL is; None for a URL of another kind. Raises `InvalidRequest`."""
    return checked_digest(url.removeprefix(_DIGEST), field) if url.startswith(_DIGEST) else None


def content_in(url: str, field: str) -> bytes:
    """Return the bytes that a `data:` URL carries. Raises `InvalidRequest`, `MediaUnreadable`.

    What it says of their type is not believed: whoever decodes them looks.
    """
    header, comma, _ = url[: _MOST_HEADER_CHARS + 1].partition(",")
    if not comma or not header.lower().endswith(_BASE64):
        raise InvalidRequest("A data: URL has the form data:TYPE;base64,DATA.", field=field)
    start = len(header) + 1
    try:
        return b"".join(
            binascii.a2b_base64(url[place : place + _PIECE_CHARS], strict_mode=True)
            for place in range(start, len(url), _PIECE_CHARS)
        )
    except ValueError:  # and its kind for what is no base64
        raise MediaUnreadable("What the data: URL carries is no base64.", field=field) from None
