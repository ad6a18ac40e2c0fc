"""Between protobuf messages and what the service works with."""

import math
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from google.protobuf.timestamp_pb2 import Timestamp

from internvl_serving.common.v1 import embedding_pb2
from internvl_serving.vision.v1 import vision_service_pb2
from shared.digest import checked_digest
from shared.embedding import Embedding, EmbeddingKey
from shared.errors import InvalidRequest, MediaTooLarge
from shared.rpc.handles import HandleSigner
from shared.rpc.messages import MESSAGE_OF_DATA_TYPE, duration_of
from vision_service.encoded import CacheTier, Encoded
from vision_service.preparer import MediaSpec
from vision_service.preprocess.estimate import Estimate
from vision_service.preprocess.frames import DEFAULT_SEGMENTS, VideoSpec
from vision_service.preprocess.tiling import TilingSpec
from vision_service.settings import VisionSettings

CHUNK_BYTES = 1 << 20
_FRAME_TILES = 1  # of a frame, where a request does not say
_MAX_TENANT_BYTES = 128

_TIERS: dict[CacheTier, embedding_pb2.CacheTier.ValueType] = {
    CacheTier.NONE: embedding_pb2.CACHE_TIER_NONE,
    CacheTier.LOCAL: embedding_pb2.CACHE_TIER_LOCAL,
    CacheTier.STORE: embedding_pb2.CACHE_TIER_STORE,
}


class EncodeStream:
    """The messages of one `Encode` call in their legal order: the header once, then chunks.

    Reads no further than asked. Raises `InvalidRequest` on a message out of place.
    """

    def __init__(self, messages: AsyncIterator[vision_service_pb2.EncodeRequest]) -> None:
        self._messages = messages

    def upload(self, max_bytes: int) -> "ChunkedUpload":
        """Return what comes after the header."""
        return ChunkedUpload(self._messages, max_bytes)

    async def header(self) -> vision_service_pb2.EncodeHeader:
        """Return the header; to be called first."""
        async for message in self._messages:
            if message.WhichOneof("message") == "header":
                return message.header
            break
        raise InvalidRequest("The first message has to be the header.", field="header")


class ChunkedUpload:
    """The chunks of one `Encode` call; see `vision_service.encoder.Upload`."""

    def __init__(self, messages: AsyncIterator[vision_service_pb2.EncodeRequest], max_bytes: int) -> None:
        self._messages = messages
        self._max_bytes = max_bytes
        self._chunks: list[bytes] = []
        self._size = 0

    async def follows(self) -> bool:
        """Return whether a chunk follows the header; raises `InvalidRequest` where something else does."""
        async for message in self._messages:
            self._add(message)
            break
        return bool(self._chunks)

    async def read(self) -> bytes:
        """Return the medium's bytes; raises `MediaTooLarge` as soon as too many have come."""
        async for message in self._messages:
            self._add(message)
        return b"".join(self._chunks)

    def _add(self, message: vision_service_pb2.EncodeRequest) -> None:
        if message.WhichOneof("message") != "chunk":
            raise InvalidRequest("After the header only chunks may follow.", field="chunk")
        self._size += len(message.chunk)
        if self._size > self._max_bytes:
            raise MediaTooLarge(f"The medium may have at most {self._max_bytes} bytes.", field="chunk")
        self._chunks.append(message.chunk)


def media_digest_of(header: vision_service_pb2.EncodeHeader) -> str:
    """Return the media digest, or raise `InvalidRequest`."""
    return checked_digest(header.media_digest, "header.media_digest")


def tenant_of(header: vision_service_pb2.EncodeHeader) -> str:
    """Return whose embedding it is, or raise `InvalidRequest`."""
    return _tenant(header.tenant, "header.tenant")


def erasure_of(request: vision_service_pb2.EraseRequest) -> tuple[str, str | None]:
    """Return whose embeddings are to be removed, and of which medium (None: of all), or raise `InvalidRequest`."""
    digest = checked_digest(request.media_digest, "media_digest") if request.media_digest else None
    return _tenant(request.tenant, "tenant"), digest


def picture_spec(spec: MediaSpec) -> TilingSpec:
    """Return how a picture is to be cut, or raise `InvalidRequest` for a video."""
    if spec.video is not None:
        raise InvalidRequest("A video cannot be estimated.", field="options.video")
    return spec.tiling


def spec_of(
    options: embedding_pb2.PreprocessOptions, default: TilingSpec, settings: VisionSettings, field: str
) -> MediaSpec:
    """Return how a medium is to be cut, or raise `InvalidRequest`; `field` is where the options are."""
    most = settings.max_tiles_limit
    max_tiles = options.max_tiles if options.HasField("max_tiles") else None
    if max_tiles is not None and not 1 <= max_tiles <= most:
        raise InvalidRequest(f"max_tiles has to be from 1 to {most}.", field=f"{field}.max_tiles")
    thumbnail = options.thumbnail if options.HasField("thumbnail") else None
    if not options.HasField("video"):
        return MediaSpec(default.adjusted(max_tiles, thumbnail))
    tiling = default.adjusted(_FRAME_TILES if max_tiles is None else max_tiles, thumbnail)
    return MediaSpec(tiling, _video_spec_of(options.video, settings, f"{field}.video"))


def _video_spec_of(video: embedding_pb2.VideoOptions, settings: VisionSettings, field: str) -> VideoSpec:
    most = settings.max_video_frames
    count = video.segment_count if video.HasField("segment_count") else min(DEFAULT_SEGMENTS, most)
    if not 1 <= count <= most:
        raise InvalidRequest(f"segment_count has to be from 1 to {most}.", field=f"{field}.segment_count")
    start_s = video.start_seconds if video.HasField("start_seconds") else None
    end_s = video.end_seconds if video.HasField("end_seconds") else None
    for name, seconds in (("start_seconds", start_s), ("end_seconds", end_s)):
        if seconds is not None and not math.isfinite(seconds):
            raise InvalidRequest(f"{name} has to be a number.", field=f"{field}.{name}")
    if start_s is not None and end_s is not None and end_s < start_s:
        raise InvalidRequest("end_seconds has to be at or after start_seconds.", field=f"{field}.end_seconds")
    return VideoSpec(count, start_s, end_s, settings.video_decoder)


@dataclass(frozen=True, slots=True)
class HandleIssuer:
    """Issues the handles of one replica: `source` is its address, `ttl_s` how long a handle is good for."""

    signer: HandleSigner
    source: str
    ttl_s: int

    def handle_of(self, encoded: Encoded) -> embedding_pb2.EmbeddingHandle:
        """Return the signed handle of an embedding."""
        handle = embedding_pb2.EmbeddingHandle(
            digest=encoded.key.digest,
            media_digest=encoded.key.media_digest,
            tenant=encoded.key.tenant,
            tile_count=encoded.info.tile_count,
            token_count=encoded.info.token_count,
            hidden_size=encoded.info.hidden_size,
            data_type=MESSAGE_OF_DATA_TYPE[encoded.info.data_type],
            source=self.source,
            expire_time=Timestamp(seconds=int(time.time()) + self.ttl_s),
            frame_count=encoded.info.frame_count,
        )
        self.signer.sign(handle)
        return handle

    def key_of(self, handle: embedding_pb2.EmbeddingHandle) -> EmbeddingKey:
        """Return what a handle names; raises `EmbeddingHandleInvalid`, and `EmbeddingNotFound` for one that is over."""
        self.signer.check(handle)
        return EmbeddingKey(handle.digest, handle.media_digest, handle.tenant)


def encode_response(encoded: Encoded, issuer: HandleIssuer) -> vision_service_pb2.EncodeResponse:
    """Return the answer."""
    return vision_service_pb2.EncodeResponse(
        handle=issuer.handle_of(encoded),
        cache_tier=_TIERS[encoded.tier],
        coalesced=encoded.coalesced,
        preprocess_duration=duration_of(encoded.timings.preprocess_s),
        queue_duration=duration_of(encoded.timings.queue_s),
        encode_duration=duration_of(encoded.timings.encode_s),
        width=encoded.info.width,
        height=encoded.info.height,
        columns=encoded.info.columns,
        rows=encoded.info.rows,
        frames=[
            embedding_pb2.VideoFrame(index=frame.index, time_seconds=frame.time_s) for frame in encoded.info.frames
        ],
    )


def estimate_response(estimate: Estimate) -> vision_service_pb2.EstimateResponse:
    """Return the answer."""
    return vision_service_pb2.EstimateResponse(
        width=estimate.width,
        height=estimate.height,
        columns=estimate.columns,
        rows=estimate.rows,
        tile_count=estimate.tile_count,
        token_count=estimate.token_count,
    )


def fetch_responses(embedding: Embedding) -> Iterator[vision_service_pb2.FetchEmbeddingResponse]:
    """Yield the header, then the tensor in chunks."""
    info = embedding.info
    header = vision_service_pb2.FetchEmbeddingHeader(
        tile_count=info.tile_count,
        token_count=info.token_count,
        hidden_size=info.hidden_size,
        data_type=MESSAGE_OF_DATA_TYPE[info.data_type],
    )
    yield vision_service_pb2.FetchEmbeddingResponse(header=header)
    payload = memoryview(embedding.payload)
    for start in range(0, len(payload), CHUNK_BYTES):
        yield vision_service_pb2.FetchEmbeddingResponse(chunk=bytes(payload[start : start + CHUNK_BYTES]))


def _tenant(tenant: str, field: str) -> str:
    if len(tenant.encode()) > _MAX_TENANT_BYTES:
        raise InvalidRequest(f"A tenant has at most {_MAX_TENANT_BYTES} bytes.", field=field)
    return tenant
