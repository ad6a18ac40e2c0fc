"""Between protobuf messages and what the service works with."""

import time
from collections.abc import AsyncIterator, Iterator

from google.protobuf.timestamp_pb2 import Timestamp

from internvl_serving.common.v1 import embedding_pb2
from internvl_serving.vision.v1 import vision_service_pb2
from shared.digest import checked_digest
from shared.embedding import Embedding
from shared.errors import InvalidRequest, MediaTooLarge
from shared.rpc.messages import MESSAGE_OF_DATA_TYPE, duration_of
from vision_service.encoder import CacheTier, Encoded
from vision_service.preprocess.tiling import TilingSpec

CHUNK_BYTES = 1 << 20

_TIERS: dict[CacheTier, embedding_pb2.CacheTier.ValueType] = {
    CacheTier.NONE: embedding_pb2.CACHE_TIER_NONE,
    CacheTier.LOCAL: embedding_pb2.CACHE_TIER_LOCAL,
    CacheTier.STORE: embedding_pb2.CACHE_TIER_STORE,
}


class EncodeStream:
    """The messages of one `Encode` call in their legal order: the header once, then chunks.

    Reads no further than asked. Raises `InvalidRequest` on a message out of place and `MediaTooLarge` as soon as more
    than `max_media_bytes` have come.
    """

    def __init__(self, messages: AsyncIterator[vision_service_pb2.EncodeRequest], max_media_bytes: int) -> None:
        self._messages = messages
        self._max_media_bytes = max_media_bytes

    async def header(self) -> vision_service_pb2.EncodeHeader:
        """Return the header; to be called first."""
        async for message in self._messages:
            if message.WhichOneof("message") == "header":
                return message.header
            break
        raise InvalidRequest("The first message has to be the header.", field="header")

    async def content(self) -> bytes | None:
        """Return the medium's bytes, or None if no chunk follows the header."""
        chunks: list[bytes] = []
        size = 0
        async for message in self._messages:
            if message.WhichOneof("message") != "chunk":
                raise InvalidRequest("After the header only chunks may follow.", field="chunk")
            size += len(message.chunk)
            if size > self._max_media_bytes:
                raise MediaTooLarge(f"A picture may have at most {self._max_media_bytes} bytes.", field="chunk")
            chunks.append(message.chunk)
        return b"".join(chunks) if chunks else None


def media_digest_of(header: vision_service_pb2.EncodeHeader) -> str:
    """Return the media digest, or raise `InvalidRequest`."""
    return checked_digest(header.media_digest, "header.media_digest")


def spec_of(header: vision_service_pb2.EncodeHeader, default: TilingSpec, max_tiles_limit: int) -> TilingSpec:
    """Return how the picture is to be cut, or raise `InvalidRequest`."""
    options = header.options
    max_tiles = options.max_tiles if options.HasField("max_tiles") else None
    if max_tiles is not None and not 1 <= max_tiles <= max_tiles_limit:
        raise InvalidRequest(f"max_tiles has to be from 1 to {max_tiles_limit}.", field="header.options.max_tiles")
    return default.adjusted(max_tiles, options.thumbnail if options.HasField("thumbnail") else None)


def encode_response(encoded: Encoded, source: str, ttl_s: int) -> vision_service_pb2.EncodeResponse:
    """Return the answer; `source` is the address of this replica, `ttl_s` how long embeddings are kept."""
    return vision_service_pb2.EncodeResponse(
        handle=_handle(encoded, source, ttl_s),
        cache_tier=_TIERS[encoded.tier],
        coalesced=encoded.coalesced,
        preprocess_duration=duration_of(encoded.timings.preprocess_s),
        queue_duration=duration_of(encoded.timings.queue_s),
        encode_duration=duration_of(encoded.timings.encode_s),
        width=encoded.info.width,
        height=encoded.info.height,
        columns=encoded.info.columns,
        rows=encoded.info.rows,
    )


def embedding_digest_of(request: vision_service_pb2.FetchEmbeddingRequest) -> str:
    """Return the embedding digest, or raise `InvalidRequest`."""
    return checked_digest(request.digest, "digest")


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


def _handle(encoded: Encoded, source: str, ttl_s: int) -> embedding_pb2.EmbeddingHandle:
    return embedding_pb2.EmbeddingHandle(
        digest=encoded.digest,
        media_digest=encoded.media_digest,
        tile_count=encoded.info.tile_count,
        token_count=encoded.info.token_count,
        hidden_size=encoded.info.hidden_size,
        data_type=MESSAGE_OF_DATA_TYPE[encoded.info.data_type],
        source=source,
        expire_time=Timestamp(seconds=int(time.time()) + ttl_s),
    )
