"""`MediaService`."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from gateway import convert
from gateway.catalogue import Catalogue
from gateway.media import MediaLibrary
from internvl_serving.gateway.v1 import media_service_pb2, media_service_pb2_grpc


class MediaServicer(media_service_pb2_grpc.MediaServiceServicer):
    """Holds the bytes of pictures, and what is known of them without a question."""

    def __init__(self, library: MediaLibrary, catalogue: Catalogue) -> None:
        self._library = library
        self._catalogue = catalogue

    async def FindMissing(
        self, request: media_service_pb2.FindMissingRequest, context: Any
    ) -> media_service_pb2.FindMissingResponse:
        """Say which digests need an upload."""
        missing = await self._library.find_missing(convert.digests(request))
        return media_service_pb2.FindMissingResponse(missing_digests=missing)

    async def Upload(self, request_iterator: Any, context: Any) -> media_service_pb2.UploadResponse:
        """Store a medium."""
        requests = aiter(request_iterator)
        digest = await convert.upload_digest(requests)
        return convert.upload_response(await self._library.upload(digest, convert.upload_chunks(requests)))

    async def Prefetch(
        self, request: media_service_pb2.PrefetchRequest, context: Any
    ) -> AsyncGenerator[media_service_pb2.PrefetchResponse, None]:
        """Have embeddings made before anybody asks."""
        async with aclosing(self._catalogue.prefetch(convert.prefetched_media(request))) as outcomes:
            async for outcome in outcomes:
                yield convert.prefetch_response(outcome)

    async def Estimate(
        self, request: media_service_pb2.EstimateRequest, context: Any
    ) -> media_service_pb2.EstimateResponse:
        """Say what a picture will take."""
        return convert.estimate_response(await self._catalogue.estimate(convert.estimated_medium(request)))

    async def DeleteMedium(
        self, request: media_service_pb2.DeleteMediumRequest, context: Any
    ) -> media_service_pb2.DeleteMediumResponse:
        """Remove a medium and what was derived from it."""
        count = await self._catalogue.delete(convert.deleted_digest(request))
        return media_service_pb2.DeleteMediumResponse(embedding_count=count)
