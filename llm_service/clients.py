"""The LLM service's client of the vision replicas: streams an embedding from the one that made it."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import structlog

from internvl_serving.common.v1 import embedding_pb2
from internvl_serving.vision.v1 import vision_service_pb2 as pb
from internvl_serving.vision.v1 import vision_service_pb2_grpc
from llm_service.embeddings import check_shape
from llm_service.prompt.dialogue import EmbeddingRef
from shared.embedding import Embedding, EmbeddingInfo
from shared.errors import EmbeddingNotFound
from shared.rpc.channel import open_channel
from shared.rpc.deadline import outgoing
from shared.rpc.messages import DATA_TYPE_OF_MESSAGE
from shared.rpc.tracing import calling
from shared.tls_files import WatchedTls

log = structlog.get_logger()
_FETCH_LIMIT_S = 30.0
_FETCH_METHOD = f"{pb.DESCRIPTOR.services_by_name['VisionService'].full_name}/FetchEmbedding"


class VisionReplicas:
    """Fetches embeddings over gRPC; keeps a channel per replica. Close it with `aclose`. Without `tls` in plaintext."""

    def __init__(self, max_message_bytes: int, tls: WatchedTls | None = None) -> None:
        self._max_message_bytes = max_message_bytes
        self._tls = tls
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def fetch(self, ref: EmbeddingRef) -> Embedding:
        """Return the embedding.

        Raises `EmbeddingNotFound` if the replica is gone or no longer has it, `EmbeddingIncompatible` if what it has is
        not what `ref` says.
        """
        stub = vision_service_pb2_grpc.VisionServiceStub(self._channel(ref.source))
        request = pb.FetchEmbeddingRequest(handle=embedding_pb2.EmbeddingHandle.FromString(ref.handle))
        with calling(_FETCH_METHOD, ref.source) as span:
            return await self._fetched(ref, stub.FetchEmbedding(request, **outgoing(_FETCH_LIMIT_S, span)))

    async def _fetched(self, ref: EmbeddingRef, call: Any) -> Embedding:
        try:
            return await _received(ref, aiter(call))
        except grpc.aio.AioRpcError as error:
            log.info("embedding_fetch_failed", source=ref.source, status=error.code().name)
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                await self._forget(ref.source)
            raise _gone(ref) from None
        finally:
            call.cancel()

    async def aclose(self) -> None:
        """Close the channels."""
        for channel in self._channels.values():
            await channel.close()

    async def _forget(self, source: str) -> None:
        """Close the channel to a replica that is gone, so that it does not try to reconnect for ever."""
        if channel := self._channels.pop(source, None):
            await channel.close()

    def _channel(self, source: str) -> grpc.aio.Channel:
        if source not in self._channels:
            self._channels[source] = open_channel(source, self._max_message_bytes, self._tls)
        return self._channels[source]


async def _received(ref: EmbeddingRef, messages: AsyncIterator[pb.FetchEmbeddingResponse]) -> Embedding:
    header = (await anext(messages, pb.FetchEmbeddingResponse())).header
    info = _info_of(header)
    check_shape(ref, info)
    payload, received = np.empty(info.size_bytes, np.uint8).data, 0
    async for message in messages:
        end = received + len(message.chunk)
        if end > info.size_bytes:
            raise _gone(ref)
        payload[received:end] = message.chunk
        received = end
    if received != info.size_bytes:
        raise _gone(ref)
    return Embedding(ref.key, info, payload)


def _info_of(header: pb.FetchEmbeddingHeader) -> EmbeddingInfo:
    data_type = DATA_TYPE_OF_MESSAGE.get(header.data_type, "float32")
    # The picture's size is nobody's business here; only the tensor's shape counts.
    return EmbeddingInfo(header.tile_count, header.token_count, header.hidden_size, data_type, 1, 1, 1, 1)


def _gone(ref: EmbeddingRef) -> EmbeddingNotFound:
    return EmbeddingNotFound("The embedding is in no cache; encode the medium again.", resource=ref.digest)
