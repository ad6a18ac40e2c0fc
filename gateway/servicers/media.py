"""`MediaService`."""

from typing import Any

from gateway import convert
from gateway.media import MediaLibrary
from internvl_serving.gateway.v1 import media_service_pb2, media_service_pb2_grpc


class MediaServicer(media_service_pb2_grpc.MediaServiceServicer):
    """Holds the bytes of pictures."""

    def __init__(self, library: MediaLibrary) -> None:
        self._library = library

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
