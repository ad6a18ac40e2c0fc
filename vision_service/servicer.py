"""VisionService over gRPC: parse, call, render."""

from collections.abc import AsyncIterator
from typing import Any

from internvl_serving.vision.v1 import vision_service_pb2, vision_service_pb2_grpc
from vision_service import convert
from vision_service.encoder import Encoder
from vision_service.preprocess.tiling import TilingSpec
from vision_service.settings import VisionSettings


class VisionServicer(vision_service_pb2_grpc.VisionServiceServicer):
    """Answers for one replica; `source` is the address under which others reach it."""

    def __init__(self, encoder: Encoder, default_spec: TilingSpec, settings: VisionSettings, source: str) -> None:
        self._encoder = encoder
        self._default_spec = default_spec
        self._settings = settings
        self._source = source

    async def Encode(self, request_iterator: Any, context: Any) -> vision_service_pb2.EncodeResponse:
        """Return the handle of a medium's embedding."""
        stream = convert.EncodeStream(request_iterator)
        header = await stream.header()
        media_digest = convert.media_digest_of(header)
        spec = convert.spec_of(header, self._default_spec, self._settings)
        max_bytes = self._settings.max_video_bytes if spec.video else self._settings.max_media_bytes
        encoded = await self._encoder.encode(media_digest, spec, stream.upload(max_bytes))
        return convert.encode_response(encoded, self._source, self._settings.embedding_ttl_s)

    async def FetchEmbedding(
        self, request: vision_service_pb2.FetchEmbeddingRequest, context: Any
    ) -> AsyncIterator[vision_service_pb2.FetchEmbeddingResponse]:
        """Stream an embedding's tensor."""
        embedding = await self._encoder.fetch(convert.embedding_digest_of(request))
        for response in convert.fetch_responses(embedding):
            yield response
