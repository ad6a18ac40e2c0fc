"""Plans calls about media without a question: what goes into each, and what became of every medium."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from internvl_client import media_convert
from internvl_client.content import Image, Media
from internvl_client.errors import MEDIA_NOT_FOUND, InternVLError, ServerError
from internvl_client.plan import MAX_INLINE_BYTES, MAX_INLINE_TOTAL_BYTES
from internvl_client.types import Prefetched, Progress
from internvl_serving.gateway.v1 import media_service_pb2

_MAX_MEDIA_PER_CALL: Final = 1000
_HEAD_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class PrefetchCall:
    """One call of Prefetch: its media in order, by their places among all that were asked for."""

    media: Mapping[int, Media]
    is_repeated: bool = False

    @property
    def uploads(self) -> dict[str, bytes]:
        """The bytes that the server must hold before the call, by digest."""
        return {
            medium.digest: medium.content
            for medium in self.media.values()
            if medium.content is not None and _inline_content(medium) is None
        }

    def request(self) -> media_service_pb2.PrefetchRequest:
        """Return the message of the call."""
        return media_convert.prefetch_request((medium, _inline_content(medium)) for medium in self.media.values())

    def without(self, digests: Iterable[str]) -> PrefetchCall:
        """Return the call for its other media."""
        left_out = set(digests)
        rest = {place: medium for place, medium in self.media.items() if medium.digest not in left_out}
        return PrefetchCall(rest, self.is_repeated)


class PrefetchTally:
    """What was asked for and what became of it so far. Tells `on_progress` how many are settled, and of how many.

    What the server has lost and can be given again is not settled by the first call but by a second one.
    """

    def __init__(self, media: Iterable[Media], on_progress: Progress | None, request_id: str) -> None:
        self._media = tuple(media)
        self._on_progress = on_progress
        self._request_id = request_id
        self._outcomes: dict[int, Prefetched] = {}
        self._lost: dict[int, Media] = {}

    def calls(self) -> Iterator[PrefetchCall]:
        """Yield the calls to make: as many media in each as the server and the size of a message allow."""
        gathered: dict[int, Media] = {}
        inline_bytes = 0
        for place, medium in enumerate(self._media):
            size = len(_inline_content(medium) or b"")
            if len(gathered) == _MAX_MEDIA_PER_CALL or inline_bytes + size > MAX_INLINE_TOTAL_BYTES:
                yield PrefetchCall(gathered)
                gathered, inline_bytes = {}, 0
            gathered[place] = medium
            inline_bytes += size
        if gathered:
            yield PrefetchCall(gathered)

    def take(self, call: PrefetchCall, response: media_service_pb2.PrefetchResponse) -> None:
        """Note what one answer to a call says."""
        place = tuple(call.media)[response.index]
        outcome = media_convert.prefetched_of(response, self._request_id)
        if _is_lost(outcome) and not call.is_repeated and call.media[place].digest in call.uploads:
            self._lost[place] = call.media[place]
        else:
            self._settle(place, outcome)

    def refuse(self, call: PrefetchCall, refusals: Mapping[str, InternVLError]) -> PrefetchCall:
        """Settle the media that the server does not take, by digest; return the call without them."""
        for place, medium in call.media.items():
            if medium.digest in refusals:
                self._settle(place, refusals[medium.digest])
        return call.without(refusals)

    def repetition(self) -> PrefetchCall:
        """Return the call that mends what the server has lost since this was last asked; it may have no media."""
        lost, self._lost = self._lost, {}
        return PrefetchCall(lost, is_repeated=True)

    def outcomes(self) -> list[Prefetched]:
        """Return what became of each medium, in the order asked."""
        return [self._outcomes.get(place) or self._missing() for place in range(len(self._media))]

    def _settle(self, place: int, outcome: Prefetched) -> None:
        self._outcomes[place] = outcome
        if self._on_progress:
            self._on_progress(len(self._outcomes), len(self._media))

    def _missing(self) -> InternVLError:
        return ServerError("The server does not say what became of this medium.", request_id=self._request_id)


@dataclass(frozen=True, slots=True)
class EstimatePlan:
    """At most two calls of Estimate.

    `second` is for a picture whose size is not within its first bytes; the server must hold `uploads` before it.
    """

    first: media_service_pb2.EstimateRequest
    second: media_service_pb2.EstimateRequest | None
    uploads: Mapping[str, bytes]


def plan_estimate(picture: Image) -> EstimatePlan:
    """Return the plan for a picture; one that has only a digest is looked up there."""
    content = picture.content
    if content is None or len(content) <= _HEAD_BYTES:
        return EstimatePlan(media_convert.estimate_request(picture, content), None, {})
    first = media_convert.estimate_request(picture, content[:_HEAD_BYTES])
    if len(content) <= MAX_INLINE_TOTAL_BYTES:
        return EstimatePlan(first, media_convert.estimate_request(picture, content), {})
    return EstimatePlan(first, media_convert.estimate_request(picture, None), {picture.digest: content})


def digest_of(medium: Media | str) -> str:
    """Return the digest of a medium; a text is one already."""
    return medium if isinstance(medium, str) else medium.digest


def _is_lost(outcome: Prefetched) -> bool:
    return isinstance(outcome, InternVLError) and outcome.reason == MEDIA_NOT_FOUND


def _inline_content(medium: Media) -> bytes | None:
    """Return the bytes that travel in a request itself: those of a small medium."""
    content = medium.content
    return content if content is not None and len(content) <= MAX_INLINE_BYTES else None
