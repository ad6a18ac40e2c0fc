"""Media apart from any question: embeddings made ahead, sizes told beforehand, everything of a medium removed."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from gateway.admission import Admission
from gateway.content import Medium, PreprocessOptions
from gateway.dialogue import Limits, PlacedMedium, check_medium
from gateway.encoder import MediaEncoder, placing_errors
from gateway.events import Encoded, MediaReceipt
from gateway.media import MediaLibrary
from shared.errors import MediaUnreadable, ServiceError


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a picture will take: its size in pixels, its grid of tiles, and what that makes with the thumbnail."""

    width: int
    height: int
    columns: int
    rows: int
    tiles: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Prefetched:
    """What became of one of the media that were asked for."""

    index: int
    outcome: MediaReceipt | ServiceError


class VisionFacts(Protocol):
    """What the vision service tells and does without encoding. Raises what it answers, and `VisionUnavailable`."""

    async def estimate(self, content: bytes, options: PreprocessOptions) -> Estimate:
        """Return what a picture of these first bytes will take; raises `MediaUnreadable` where more are needed."""

    async def erase(self, media_digest: str) -> int:
        """Remove what was derived from a medium; return how many embeddings the store held."""


class Catalogue:
    """Media as a shop has them: known before the first question. `parallel` are worked on at a time.

    No more than `max_sent_bytes` of a picture go to the vision service for an estimate.
    """

    # Of a picture that was uploaded: its header is within these bytes, or else the whole picture is sent.
    _HEAD_BYTES = 64 << 10

    def __init__(
        self,
        vision: VisionFacts,
        encoder: MediaEncoder,
        library: MediaLibrary,
        limits: Limits,
        *,
        parallel: int,
        max_sent_bytes: int,
        admission: Admission | None = None,
    ) -> None:
        self._admission = admission or Admission()
        self._vision = vision
        self._encoder = encoder
        self._library = library
        self._limits = limits
        self._parallel = parallel
        self._max_sent_bytes = max_sent_bytes

    async def prefetch(self, media: Sequence[Medium]) -> AsyncGenerator[Prefetched, None]:
        """Have the embeddings made; yield what became of each as it is done. One that fails is no other's fault."""
        room = asyncio.Semaphore(self._parallel)

        async def one(index: int) -> Prefetched:
            async with room:
                return Prefetched(index, await self._prefetched(PlacedMedium(media[index], f"media[{index}]")))

        tasks = [asyncio.create_task(one(index)) for index in range(len(media))]
        try:
            for done in asyncio.as_completed(tasks):
                yield await done
        finally:
            for task in tasks:
                task.cancel()

    async def estimate(self, medium: Medium) -> Estimate:
        """Return what a picture will take.

        Raises `MediaNotFound` for a digest that is not held, `MediaUnreadable`, `VisionUnavailable`.
        """
        with placing_errors("media"):
            if medium.content is not None:
                return await self._vision.estimate(medium.content, medium.options)
            content = await self._library.content_of(medium)
            try:
                return await self._vision.estimate(content[: self._HEAD_BYTES], medium.options)
            except MediaUnreadable:
                if not self._HEAD_BYTES < len(content) <= self._max_sent_bytes:
                    raise
            return await self._vision.estimate(content, medium.options)

    async def delete(self, media_digest: str) -> int:
        """Remove a medium's bytes and all its embeddings; return how many of those there were.

        Raises `StoreUnavailable` and `VisionUnavailable`: then something may be left, and it can be asked for again.
        """
        await self._library.delete(media_digest)
        return await self._vision.erase(media_digest)

    async def _prefetched(self, placed: PlacedMedium) -> MediaReceipt | ServiceError:
        try:
            check_medium(placed, self._limits)
            identified = await self._library.identify_medium(placed.medium)
            with self._admission.media(identified) as settle:
                encoded: Encoded = await self._encoder.prefetch(PlacedMedium(identified, placed.field))
                settle(encoded)
        except ServiceError as error:
            return error
        return MediaReceipt(identified.digest, encoded, None)
