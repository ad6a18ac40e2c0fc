"""The gRPC clients of the vision and the LLM service."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import grpc
import structlog

from gateway import stage_messages
from gateway.catalogue import Estimate
from gateway.content import Medium, PreprocessOptions
from gateway.events import Encoded, Generated, GenerateEvent, GenerateRequest
from gateway.prompt import Prompt
from internvl_serving.llm.v1 import llm_service_pb2_grpc
from internvl_serving.vision.v1 import vision_service_pb2, vision_service_pb2_grpc
from shared.errors import (
    EmbeddingNotFound,
    InvalidRequest,
    LlmUnavailable,
    NotReady,
    ServiceError,
    Unavailable,
    VisionUnavailable,
)
from shared.rpc.deadline import outgoing
from shared.rpc.status import from_rpc_error

log = structlog.get_logger()
CHUNK_BYTES = 1 << 20


class VisionClient:
    """The vision service behind a channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = vision_service_pb2_grpc.VisionServiceStub(channel)

    async def find(self, medium: Medium, *, prefetch: bool = False) -> Encoded | None:
        """Return the medium's embedding if a cache holds it; None: its bytes are needed."""
        try:
            return await self.encode(medium, b"", prefetch=prefetch)
        except EmbeddingNotFound:
            return None

    async def encode(self, medium: Medium, content: bytes, *, prefetch: bool = False) -> Encoded:
        """Return the medium's embedding, made from `content` where no cache holds it."""
        header = stage_messages.encode_header(medium, prefetch=prefetch)
        response = await _answer(self._stub.Encode(_encode_requests(header, content), **outgoing()))
        return stage_messages.encoded(response)

    async def estimate(self, content: bytes, options: PreprocessOptions) -> Estimate:
        """Return what a picture of these first bytes will take."""
        request = stage_messages.estimate_request(content, options)
        return stage_messages.estimate(await _answer(self._stub.Estimate(request, **outgoing())))

    async def erase(self, media_digest: str) -> int:
        """Remove what was derived from a medium; return how many embeddings the store held."""
        request = vision_service_pb2.EraseRequest(media_digest=media_digest)
        response = await _answer(self._stub.Erase(request, **outgoing()))
        count: int = response.embedding_count
        return count


class LlmClient:
    """The LLM service behind a channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = llm_service_pb2_grpc.LlmServiceStub(channel)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateEvent, None]:
        """Stream one answer; closing the stream aborts it."""
        call = self._stub.Generate(stage_messages.generate_request(request), **outgoing())
        is_complete = False
        try:
            async for response in call:
                event = stage_messages.generate_event(response)
                is_complete = isinstance(event, Generated)
                if event is not None:
                    yield event
        except grpc.aio.AioRpcError as error:
            if not is_complete:
                raise _translated(error, LlmUnavailable) from error
            log.warning("complete_answer_ended_badly", code=error.code().name)
        finally:
            call.cancel()  # a call object that is dropped goes on otherwise

    async def score_turns(self, prompt: Prompt, choices: Sequence[str]) -> list[tuple[float, ...]]:
        """Return the probability of each choice at each turn of the model's, the one to come included."""
        call = self._stub.ScoreTurns(stage_messages.score_turns_request(prompt, choices), **outgoing())
        try:
            return stage_messages.turn_scores(await call)
        except grpc.aio.AioRpcError as error:
            raise _translated(error, LlmUnavailable) from error
        finally:
            call.cancel()  # a call object that is dropped goes on otherwise


async def _answer(call: Any) -> Any:
    """Return the vision service's answer to a call, or raise its error in our own words."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise _translated(error, VisionUnavailable) from error
    finally:
        call.cancel()  # a call object that is dropped goes on otherwise


async def _encode_requests(
    header: vision_service_pb2.EncodeHeader, content: bytes
) -> AsyncIterator[vision_service_pb2.EncodeRequest]:
    yield vision_service_pb2.EncodeRequest(header=header)
    for start in range(0, len(content), CHUNK_BYTES):
        yield vision_service_pb2.EncodeRequest(chunk=content[start : start + CHUNK_BYTES])


def _translated(error: grpc.RpcError, unavailable: type[Unavailable]) -> ServiceError:
    """Return the error in the words of our own API: the stage is away, the prompt is what `messages` became."""
    known = from_rpc_error(error, unavailable)
    if isinstance(known, NotReady):
        return unavailable(known.message, retry_after_s=known.retry_after_s)
    if isinstance(known, InvalidRequest) and known.field and known.field.split(".")[0] == "prompt":
        inner = known.field.removeprefix("prompt.")
        return type(known)(known.message, field=inner if inner.startswith("tools") else "messages")
    return known
