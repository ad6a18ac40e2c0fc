"""The LLM service's client of the vision replicas: streams an embedding from the one that made it."""

import grpc
import structlog

from internvl_serving.vision.v1 import vision_service_pb2 as pb
from internvl_serving.vision.v1 import vision_service_pb2_grpc
from llm_service.prompt.dialogue import EmbeddingRef
from shared.embedding import Embedding, EmbeddingInfo
from shared.errors import EmbeddingNotFound
from shared.rpc.channel import open_channel
from shared.rpc.deadline import outgoing

log = structlog.get_logger()
_FETCH_LIMIT_S = 30.0


class VisionReplicas:
    """Fetches embeddings over gRPC; keeps a channel per replica. Close it with `aclose`."""

    def __init__(self, max_message_bytes: int) -> None:
        self._max_message_bytes = max_message_bytes
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def fetch(self, ref: EmbeddingRef) -> Embedding:
        """Return the embedding; raise `EmbeddingNotFound` if the replica is gone or no longer has it."""
        stub = vision_service_pb2_grpc.VisionServiceStub(self._channel(ref.source))
        call = stub.FetchEmbedding(pb.FetchEmbeddingRequest(digest=ref.digest), **outgoing(_FETCH_LIMIT_S))
        payload = bytearray()
        try:
            async for message in call:
                payload += message.chunk
        except grpc.aio.AioRpcError as error:
            log.info("embedding_fetch_failed", source=ref.source, status=error.code().name)
            raise _gone(ref) from None
        finally:
            call.cancel()
        return _embedding_of(ref, payload)

    async def aclose(self) -> None:
        """Close the channels."""
        for channel in self._channels.values():
            await channel.close()

    def _channel(self, source: str) -> grpc.aio.Channel:
        if source not in self._channels:
            self._channels[source] = open_channel(source, self._max_message_bytes)
        return self._channels[source]


def _embedding_of(ref: EmbeddingRef, payload: bytearray) -> Embedding:
    # The picture's size is nobody's business here; only the tensor's shape is checked.
    info = EmbeddingInfo(ref.tile_count, ref.token_count, ref.hidden_size, ref.data_type, 1, 1, 1, 1)
    if len(payload) != info.size_bytes:
        raise _gone(ref)
    return Embedding(ref.digest, info, payload)


def _gone(ref: EmbeddingRef) -> EmbeddingNotFound:
    return EmbeddingNotFound("The embedding is in no cache; encode the medium again.", resource=ref.digest)
