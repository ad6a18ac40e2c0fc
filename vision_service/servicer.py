"""VisionService over gRPC: parse, call, render."""

from collections.abc import AsyncIterator
from typing import Any

from internvl_serving.vision.v1 import vision_service_pb2, vision_service_pb2_grpc
from shared.rpc.status_messages import status_message
from shared.service_status import ProcessStatus, StatusSource
from vision_service import convert
from vision_service.encoder import Encoder
from vision_service.preparer import MediaPreparer
from vision_service.preprocess.tiling import TilingSpec
from vision_service.settings import VisionSettings


class VisionServicer(vision_service_pb2_grpc.VisionServiceServicer):
    """Answers for one replica."""

    def __init__(
        self,
        encoder: Encoder,
        preparer: MediaPreparer,
        issuer: convert.HandleIssuer,
        default_spec: TilingSpec,
        settings: VisionSettings,
        process: StatusSource | None = None,
    ) -> None:
        self._encoder = encoder
        self._preparer = preparer
        self._issuer = issuer
        self._default_spec = default_spec
        self._settings = settings
        self._process = process or ProcessStatus()

    async def Encode(self, request_iterator: Any, context: Any) -> vision_service_pb2.EncodeResponse:
        """Return the handle of a medium's embedding."""
        stream = convert.EncodeStream(request_iterator)
        header = await stream.header()
        spec = convert.spec_of(header.options, self._default_spec, self._settings, "header.options")
        media_digest, tenant = convert.media_digest_of(header), convert.tenant_of(header)
        wanted = self._encoder.wanted(media_digest, spec, tenant, prefetch=header.prefetch)
        max_bytes = self._settings.max_video_bytes if wanted.is_video else self._settings.max_media_bytes
        encoded = await self._encoder.encode(wanted, stream.upload(max_bytes))
        return convert.encode_response(encoded, self._issuer)

    async def FetchEmbedding(
        self, request: vision_service_pb2.FetchEmbeddingRequest, context: Any
    ) -> AsyncIterator[vision_service_pb2.FetchEmbeddingResponse]:
        """Stream an embedding's tensor."""
        embedding = await self._encoder.fetch(self._issuer.key_of(request.handle))
        for response in convert.fetch_responses(embedding):
            yield response

    async def Estimate(
        self, request: vision_service_pb2.EstimateRequest, context: Any
    ) -> vision_service_pb2.EstimateResponse:
        """Say what a picture will take."""
        spec = convert.spec_of(request.options, self._default_spec, self._settings, "options")
        return convert.estimate_response(await self._preparer.estimate(request.content, convert.picture_spec(spec)))

    async def Erase(self, request: vision_service_pb2.EraseRequest, context: Any) -> vision_service_pb2.EraseResponse:
        """Remove what was derived from a medium or from all of a tenant."""
        tenant, media_digest = convert.erasure_of(request)
        return vision_service_pb2.EraseResponse(embedding_count=await self._encoder.erase(tenant, media_digest))

    async def GetStatus(
        self, request: vision_service_pb2.GetStatusRequest, context: Any
    ) -> vision_service_pb2.GetStatusResponse:
        """Say how this replica is."""
        return vision_service_pb2.GetStatusResponse(status=status_message(await self._process.status()))
