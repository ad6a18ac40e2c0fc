"""Gets the embeddings of a turn's media from the vision service, sending bytes only where no cache has them."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from gateway.caller import current_caller
from gateway.content import Medium
from gateway.dialogue import PlacedMedium
from gateway.events import CacheTier, Encoded
from gateway.media import MediaLibrary
from shared.errors import InvalidRequest, QueueFull, StoreUnavailable, VisionUnavailable
from shared.lru import LruCache
from shared.rpc.deadline import remaining_s

T = TypeVar("T")
_EARLIER_HANDLES = 10_000
_RETRY_S = 1.0  # where a full service does not say when to come again


class Vision(Protocol):
    """The vision service. Both methods raise what it answers, `VisionUnavailable` when it cannot be reached."""

    async def find(self, medium: Medium, *, prefetch: bool = False) -> Encoded | None:
        """Return the medium's embedding if a cache holds it; None: its bytes are needed."""

    async def encode(self, medium: Medium, content: bytes, *, prefetch: bool = False) -> Encoded:
        """Return the medium's embedding, made from `content` where no cache holds it.

        `prefetch`: after everything that somebody waits for.
        """


class MediaEncoder:
    """Turns the media of a dialogue into embeddings, `parallel` at a time.

    A vision service that is full is asked again, for `patience_s` after the last of the dialogue's media went through.
    Where none can be reached, a handle from earlier may do: the embedding store may well have the embedding still.
    """

    def __init__(self, vision: Vision, library: MediaLibrary, parallel: int, patience_s: float = 10.0) -> None:
        self._vision = vision
        self._earlier = LruCache[tuple[str, Medium], Encoded](_EARLIER_HANDLES, lambda encoded: 1)
        self._library = library
        self._parallel = parallel
        self._patience_s = patience_s

    async def encode(self, media: Sequence[PlacedMedium]) -> dict[Medium, Encoded]:
        """Return the embedding of each distinct medium.

        Raises `MediaNotFound` when bytes are needed that nobody holds, `QueueFull` when the vision service stays full,
        and what it says about a picture, with the request's field that it came in.
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
        return await self._each(media, self._encode_anew)

    async def prefetch(self, placed: PlacedMedium) -> Encoded:
        """Return the embedding of a medium that nobody waits for; raises as `encode` does."""
        with placing_errors(placed.field):
            return await _Queue(self._patience_s).passed(
                lambda: _repeated(lambda: self._found_or_encoded(placed.medium, prefetch=True))
            )

    async def _each(
        self, media: Sequence[PlacedMedium], encode: Callable[[Medium], Awaitable[Encoded]]
    ) -> dict[Medium, Encoded]:
        distinct = _distinct(media)
        room = asyncio.Semaphore(self._parallel)
        queue = _Queue(self._patience_s)

        async def encode_one(placed: PlacedMedium) -> Encoded:
            async with room:
                with placing_errors(placed.field):
                    return await queue.passed(lambda: encode(placed.medium))

        results = await all_or_first_error([encode_one(placed) for placed in distinct])
        return {placed.medium: encoded for placed, encoded in zip(distinct, results, strict=True)}

    async def _encode(self, medium: Medium) -> Encoded:
        try:
            encoded = await _repeated(lambda: self._found_or_encoded(medium))
        except VisionUnavailable:
            earlier = self._earlier.get(_place(medium))
            if earlier is None:
                raise
            return replace(earlier, cache_tier=CacheTier.LOCAL)
        self._earlier.put(_place(medium), encoded)
        return encoded

    async def _found_or_encoded(self, medium: Medium, *, prefetch: bool = False) -> Encoded:
        await self._check_held(medium)
        found = await self._vision.find(medium, prefetch=prefetch)
        return found or await self._encode_content(medium, prefetch=prefetch)

    async def _check_held(self, medium: Medium) -> None:
        """Raise `MediaNotFound` where the embedding that may be found is not the caller's to see."""
        try:
            await self._library.check_held(medium)
        except StoreUnavailable:
            if self._earlier.get(_place(medium)) is None:  # who had it then is no stranger to it
                raise

    async def _encode_anew(self, medium: Medium) -> Encoded:
        return await _repeated(lambda: self._encode_content(medium))

    async def _encode_content(self, medium: Medium, *, prefetch: bool = False) -> Encoded:
        return await self._vision.encode(medium, await self._library.content_of(medium), prefetch=prefetch)


def _place(medium: Medium) -> tuple[str, Medium]:
    """Return where an earlier handle of the current caller's medium is."""
    return current_caller().tenant, replace(medium, content=None)


def _distinct(media: Sequence[PlacedMedium]) -> list[PlacedMedium]:
    """Return the first of each medium, or the first that brought its bytes."""
    found: dict[Medium, PlacedMedium] = {}
    for placed in media:
        if placed.medium not in found or found[placed.medium].medium.content is None:
            # The key stays the first one; equal media differ in nothing but the bytes they carry.
            found[placed.medium] = placed if placed.medium.content else found.get(placed.medium, placed)
    return list(found.values())


class _Queue:
    """The calls of one dialogue at a vision service that may be full, of this dialogue's own media even.

    While some of them are being worked on, the others wait. When none is, others are to blame: then `patience_s`
    counts, so that a service that has too much to do is not waited for by everybody.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._last_passed = time.monotonic()
        self._open_calls = 0

    async def passed(self, call: Callable[[], Awaitable[Encoded]]) -> Encoded:
        """Make the call, again when the service says so; raise `QueueFull` where it stays full, or no time is left."""
        while True:
            try:
                return await self._call(call)
            except QueueFull as error:
                wait_s = _RETRY_S if error.retry_after_s is None else error.retry_after_s
                if not self._is_worth_while(wait_s):
                    raise
                await asyncio.sleep(wait_s)

    async def _call(self, call: Callable[[], Awaitable[Encoded]]) -> Encoded:
        self._open_calls += 1
        try:
            encoded = await call()
        finally:
            self._open_calls -= 1
        self._last_passed = time.monotonic()
        return encoded

    def _is_worth_while(self, wait_s: float) -> bool:
        left_s = remaining_s()
        if left_s is not None and wait_s >= left_s:
            return False
        return self._open_calls > 0 or time.monotonic() + wait_s <= self._last_passed + self._patience_s


async def _repeated(encode: Callable[[], Awaitable[Encoded]]) -> Encoded:
    """Encode, once more if the replica was lost: encoding changes nothing but caches."""
    try:
        return await encode()
    except VisionUnavailable:
        return await encode()


@contextmanager
def placing_errors(field: str) -> Iterator[None]:
    """Say of what the vision service refuses which field of our own request it came in."""
    try:
        yield
    except InvalidRequest as error:
        # `header.options.X` or `options.X` of the vision service is `options.X` of the medium here.
        _, is_option, option = (error.field or "").partition("options")
        raise type(error)(error.message, field=f"{field}.options{option}" if is_option else field) from error


async def all_or_first_error(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Return all results in order; when one call fails, end the others and raise its error."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
