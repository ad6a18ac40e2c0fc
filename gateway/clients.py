"""The gRPC clients of the vision and the LLM service."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Final

import grpc
import structlog

from gateway import stage_messages
from gateway.answer_trace import AnswerTrace
from gateway.catalogue import Estimate
from gateway.content import Medium, PreprocessOptions
from gateway.events import Encoded, Generated, GenerateEvent, GenerateRequest, ServedModel
from gateway.prompt import Prompt
from gateway.routing import Fleet, Replica, Visit, affinity_of
from internvl_serving.llm.v1 import llm_service_pb2
from internvl_serving.vision.v1 import vision_service_pb2
from shared.errors import (
    EmbeddingNotFound,
    InvalidRequest,
    LlmUnavailable,
    NotReady,
    QueueFull,
    ServiceError,
    Unavailable,
    VisionUnavailable,
)
from shared.rpc.deadline import outgoing
from shared.rpc.status import from_rpc_error
from shared.rpc.tracing import calling

log = structlog.get_logger()
CHUNK_BYTES = 1 << 20
_VISION_SERVICE: Final[str] = vision_service_pb2.DESCRIPTOR.services_by_name["VisionService"].full_name
_LLM_SERVICE: Final[str] = llm_service_pb2.DESCRIPTOR.services_by_name["LlmService"].full_name


class VisionClient:
    """The vision service: its replicas, each medium always at the same one as long as that can be had."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def find(self, medium: Medium, *, prefetch: bool = False) -> Encoded | None:
        """Return the medium's embedding if a cache holds it; None: its bytes are needed."""
        try:
            return await self.encode(medium, b"", prefetch=prefetch)
        except EmbeddingNotFound:
            return None

    async def encode(self, medium: Medium, content: bytes, *, prefetch: bool = False) -> Encoded:
        """Return the medium's embedding, made from `content` where no cache holds it."""
        header = stage_messages.encode_header(medium, prefetch=prefetch)
        response = await self._ask("Encode", medium.digest, lambda: _encode_requests(header, content))
        return stage_messages.encoded(response)

    async def estimate(self, content: bytes, options: PreprocessOptions) -> Estimate:
        """Return what a picture of these first bytes will take."""
        request = stage_messages.estimate_request(content, options)
        return stage_messages.estimate(await self._ask("Estimate", "", lambda: request))

    async def erase(self, media_digest: str) -> int:
        """Remove what was derived from a medium; return how many embeddings the store held."""
        request = stage_messages.erase_request(media_digest)
        response = await self._ask("Erase", media_digest, lambda: request)
        count: int = response.embedding_count
        return count

    async def _ask(self, rpc: str, key: str, request: Callable[[], Any]) -> Any:
        return await _answer(self._fleet, f"{_VISION_SERVICE}/{rpc}", key, request, VisionUnavailable)


class LlmClient:
    """The LLM service: its replicas, each dialogue at the one that has read it, as long as that has room."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateEvent, None]:
        """Stream one answer; closing the stream aborts it.

        A replica that is lost or full before it has said anything is left for another, once.
        """
        key = request.conversation_id or affinity_of(request.prompt)
        tried: list[Replica] = []
        while True:
            has_begun = False
            try:
                async with self._fleet.visit(key, tried) as visit:
                    tried.append(visit.replica)
                    async with aclosing(_generated(visit, request)) as events:
                        async for event in events:
                            has_begun = True
                            yield event
                return
            except (LlmUnavailable, QueueFull) as error:
                if has_begun or not self._fleet.is_worth_another(tried, error):
                    raise
                log.info("stage_asked_again", stage="llm", reason=error.reason, left=tried[-1].address)

    async def score_turns(self, prompt: Prompt, choices: Sequence[str]) -> list[tuple[float, ...]]:
        """Return the probability of each choice at each turn of the model's, the one to come included."""
        request = stage_messages.score_turns_request(prompt, choices)
        response = await self._ask("ScoreTurns", affinity_of(prompt), lambda: request)
        return stage_messages.turn_scores(response)

    async def describe_model(self) -> ServedModel:
        """Return what is served."""
        request = llm_service_pb2.DescribeModelRequest()
        response = await self._ask("DescribeModel", "", lambda: request)
        return ServedModel(response.model, response.max_context_tokens)

    async def token_ids(self, prompt: Prompt | str) -> tuple[int, ...]:
        """Return the tokens of a prompt in the model's template, or of plain text without one."""
        request = stage_messages.count_tokens_request(prompt)
        response = await self._ask("CountTokens", "", lambda: request)
        return tuple(response.token_ids)

    async def _ask(self, rpc: str, key: str, request: Callable[[], Any]) -> Any:
        return await _answer(self._fleet, f"{_LLM_SERVICE}/{rpc}", key, request, LlmUnavailable)


async def _generated(visit: Visit, request: GenerateRequest) -> AsyncGenerator[GenerateEvent, None]:
    with calling(f"{_LLM_SERVICE}/Generate", visit.replica.address) as span:
        call = visit.stub.Generate(stage_messages.generate_request(request), **outgoing(span=span))
        trace, is_complete = AnswerTrace(span, request), False
        try:
            async for response in call:
                visit.answered()
                event = stage_messages.generate_event(response)
                if isinstance(event, Generated):
                    is_complete, event = True, replace(event, replica=visit.replica.address)
                if event is not None:
                    trace.note(event)
                    yield event
        except grpc.aio.AioRpcError as error:
            if not is_complete:
                raise _translated(error, LlmUnavailable) from error
            log.warning("complete_answer_ended_badly", code=error.code().name)
        finally:
            call.cancel()  # a call object that is dropped goes on otherwise


async def _answer(
    fleet: Fleet, method: str, key: str, request: Callable[[], Any], unavailable: type[Unavailable]
) -> Any:
    """Return a stage's answer to a call that may be made twice, or raise its error in our own words."""

    async def answer(visit: Visit) -> Any:
        with calling(method, visit.replica.address) as span:
            call = getattr(visit.stub, method.rpartition("/")[2])(request(), **outgoing(span=span))
            try:
                return await call
            except grpc.aio.AioRpcError as error:
                raise _translated(error, unavailable) from error
            finally:
                call.cancel()  # a call object that is dropped goes on otherwise

    return await fleet.ask(key, answer)


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
