"""Gets the embeddings of a turn's media from the vision service, sending bytes only where no cache has them."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from gateway.content import Medium
from gateway.dialogue import PlacedMedium
from gateway.events import Encoded
from gateway.media import MediaLibrary
from shared.errors import InvalidRequest, VisionUnavailable

T = TypeVar("T")


class Vision(Protocol):
    """The vision service. Both methods raise what it answers, `VisionUnavailable` when it cannot be reached."""

    async def find(self, medium: Medium) -> Encoded | None:
        """Return the medium's embedding if a cache holds it; None: its bytes are needed."""

    async def encode(self, medium: Medium, content: bytes) -> Encoded:
        """Return the medium's embedding, made from `content` where no cache holds it."""


class MediaEncoder:
    """Turns the media of a dialogue into embeddings, several at a time."""

    def __init__(self, vision: Vision, library: MediaLibrary, parallel: int) -> None:
        self._vision = vision
        self._library = library
        self._parallel = parallel

    async def encode(self, media: Sequence[PlacedMedium]) -> dict[Medium, Encoded]:
        """Return the embedding of each distinct medium.

        Raises `MediaNotFound` when bytes are needed that nobody holds, and what the vision service says about a
        picture, with the request's field that it came in.
        """
        use = asyncio.create_task(self._library.note_use([placed.medium for placed in media]))
        try:
            encoded = await self._each(media, self._encode)
            await use
            return encoded
        finally:
            use.cancel()

    async def encode_again(self, media: Sequence[PlacedMedium]) -> dict[Medium, Encoded]:
        """Return the embeddings anew, sending the bytes whether or not a cache claims to hold the embedding."""
        return await self._each(media, self._encode_content)

    async def _each(
        self, media: Sequence[PlacedMedium], encode: Callable[[Medium], Awaitable[Encoded]]
    ) -> dict[Medium, Encoded]:
        distinct = _distinct(media)
        room = asyncio.Semaphore(self._parallel)

        async def encode_one(placed: PlacedMedium) -> Encoded:
            async with room:
                with _placing_errors(placed.field):
                    return await _repeated(lambda: encode(placed.medium))

        results = await _all_or_first_error([encode_one(placed) for placed in distinct])
        return {placed.medium: encoded for placed, encoded in zip(distinct, results, strict=True)}

    async def _encode(self, medium: Medium) -> Encoded:
        return await self._vision.find(medium) or await self._encode_content(medium)

    async def _encode_content(self, medium: Medium) -> Encoded:
        return await self._vision.encode(medium, await self._library.content_of(medium))


def _distinct(media: Sequence[PlacedMedium]) -> list[PlacedMedium]:
    """Return the first of each medium, or the first that brought its bytes."""
    found: dict[Medium, PlacedMedium] = {}
    for placed in media:
        if placed.medium not in found or found[placed.medium].medium.content is None:
            # The key stays the first one; equal media differ in nothing but the bytes they carry.
            found[placed.medium] = placed if placed.medium.content else found.get(placed.medium, placed)
    return list(found.values())


async def _repeated(encode: Callable[[], Awaitable[Encoded]]) -> Encoded:
    """Encode, once more if the replica was lost: encoding changes nothing but caches."""
    try:
        return await encode()
    except VisionUnavailable:
        return await encode()


@contextmanager
def _placing_errors(field: str) -> Iterator[None]:
    try:
        yield
    except InvalidRequest as error:
        raise type(error)(error.message, field=field) from error


async def _all_or_first_error(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Return all results in order; when one call fails, end the others and raise its error."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
