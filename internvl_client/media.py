"""Media at the server, for the blocking client: their bytes, and what is known of them without a question."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing

import grpc

from internvl_client import convert, media_convert
from internvl_client.channel import SHORT_CALL_S, CallScope
from internvl_client.content import Image, Media
from internvl_client.errors import MEDIA_UNREADABLE, InvalidRequestError, translated
from internvl_client.media_plan import PrefetchCall, PrefetchTally, digest_of, plan_estimate
from internvl_client.plan import MAX_DIGESTS_PER_REQUEST, KnownDigests
from internvl_client.types import Estimate, Prefetched, Progress, UploadedMedia
from internvl_serving.gateway.v1 import media_service_pb2, media_service_pb2_grpc


class MediaCalls:
    """The calls of `MediaService` through a channel to `address`. Safe to share between threads.

    Knows what the server was last seen to hold, and sends that no more. Raises `InternVLError`.
    """

    def __init__(self, channel: grpc.Channel, address: str) -> None:
        self._stub = media_service_pb2_grpc.MediaServiceStub(channel)
        self._address = address
        self._known = KnownDigests()

    def provide(self, contents: Mapping[str, bytes], scope: CallScope, *, anew: bool = False) -> None:
        """Have the server hold `contents`, by digest; `anew` asks it even about what it was seen to hold."""
        if anew:
            self._known.discard(contents)
        unknown = self._known.unknown(contents)
        for digest in self.find_missing(unknown, scope):
            self.upload(digest, contents[digest], scope)
        self._known.add(unknown)

    def find_missing(self, digests: Sequence[str], scope: CallScope) -> list[str]:
        """Return those of `digests` whose bytes the server does not hold."""
        missing: list[str] = []
        for start in range(0, len(digests), MAX_DIGESTS_PER_REQUEST):
            request = media_service_pb2.FindMissingRequest(digests=digests[start : start + MAX_DIGESTS_PER_REQUEST])
            with translated(self._address, scope.request_id):
                missing += self._stub.FindMissing(request, **scope.options(SHORT_CALL_S)).missing_digests
        return missing

    def upload(self, digest: str, content: bytes, scope: CallScope) -> UploadedMedia:
        """Upload a medium whether or not the server holds it."""
        with translated(self._address, scope.request_id):
            response = self._stub.Upload(convert.upload_requests(digest, content), **scope.options())
        return convert.uploaded_of(response)

    def prefetch(self, media: Iterable[Media], on_progress: Progress | None, scope: CallScope) -> list[Prefetched]:
        """Have embeddings made; return what became of each medium, in the order asked."""
        tally = PrefetchTally(media, on_progress, scope.request_id)
        for call in tally.calls():
            self._prefetch(call, tally, scope)
            self._prefetch(tally.repetition(), tally, scope)
        return tally.outcomes()

    def estimate(self, picture: Image, scope: CallScope) -> Estimate:
        """Return what a picture will take, from its first bytes, or from all where those do not say it."""
        plan = plan_estimate(picture)
        try:
            return self._estimate(plan.first, scope)
        except InvalidRequestError as error:
            if plan.second is None or error.reason != MEDIA_UNREADABLE:
                raise
        self.provide(plan.uploads, scope, anew=True)
        return self._estimate(plan.second, scope)

    def delete(self, medium_or_digest: Media | str, scope: CallScope) -> int:
        """Remove a medium and its embeddings; return how many of those the embedding store held."""
        digest = digest_of(medium_or_digest)
        try:
            with translated(self._address, scope.request_id):
                request = media_service_pb2.DeleteMediumRequest(digest=digest)
                return self._stub.DeleteMedium(request, **scope.options(SHORT_CALL_S)).embedding_count
        finally:  # a call that failed may have removed the bytes
            self._known.discard([digest])

    def _prefetch(self, call: PrefetchCall, tally: PrefetchTally, scope: CallScope) -> None:
        if call.is_repeated:
            self._known.discard(call.uploads)
        accepted = tally.refuse(call, self._offer(call.uploads, scope))
        if not accepted.media:
            return
        with closing(self._prefetched(accepted.request(), scope)) as responses:
            for response in responses:
                tally.take(accepted, response)

    def _offer(self, contents: Mapping[str, bytes], scope: CallScope) -> dict[str, InvalidRequestError]:
        """Have the server hold those of `contents` that it takes; return why it does not take the others."""
        refusals: dict[str, InvalidRequestError] = {}
        unknown = self._known.unknown(contents)
        for digest in self.find_missing(unknown, scope):
            try:
                self.upload(digest, contents[digest], scope)
            except InvalidRequestError as error:
                refusals[digest] = error
        self._known.add(digest for digest in unknown if digest not in refusals)
        return refusals

    def _prefetched(
        self, request: media_service_pb2.PrefetchRequest, scope: CallScope
    ) -> Generator[media_service_pb2.PrefetchResponse, None, None]:
        call = self._stub.Prefetch(request, **scope.options())
        try:
            with translated(self._address, scope.request_id):
                yield from call
        finally:
            call.cancel()

    def _estimate(self, request: media_service_pb2.EstimateRequest, scope: CallScope) -> Estimate:
        with translated(self._address, scope.request_id):
            return media_convert.estimate_of(self._stub.Estimate(request, **scope.options(SHORT_CALL_S)))
