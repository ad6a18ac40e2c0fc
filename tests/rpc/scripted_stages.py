"""Scripted vision and LLM servers, a gateway between real channels and them, and what tests say to it."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.app import lifespan
from gateway.settings import GatewaySettings
from internvl_serving.common.v1 import embedding_pb2, generation_pb2
from internvl_serving.gateway.v1 import (
    batch_service_pb2_grpc,
    chat_service_pb2,
    chat_service_pb2_grpc,
    content_pb2,
    conversation_service_pb2,
    conversation_service_pb2_grpc,
    media_service_pb2,
    media_service_pb2_grpc,
)
from internvl_serving.llm.v1 import llm_service_pb2, llm_service_pb2_grpc
from internvl_serving.vision.v1 import vision_service_pb2, vision_service_pb2_grpc
from shared.digest import digest_of
from shared.errors import EmbeddingNotFound, LlmUnavailable, MediaUnreadable, ServiceError
from shared.rpc.deadline import remaining_s, request_id
from shared.rpc.interceptors import CallInterceptor, CallRegistry
from shared.rpc.server import serve, server_options
from shared.rpc.status import from_rpc_error

CAT = b"the bytes of a cat" * 100_000  # more than one chunk
DOG = b"the bytes of a dog"
USER, ASSISTANT = generation_pb2.ROLE_USER, generation_pb2.ROLE_ASSISTANT
GENERATION = generation_pb2.GenerationConfig


class ScriptedVision(vision_service_pb2_grpc.VisionServiceServicer):
    """Encodes anything, once, a video as its frames; `error` is raised instead, when set.

    Estimates any picture of which it gets `header_bytes`, and erases what it has encoded.
    """

    def __init__(self) -> None:
        self.known: dict[str, bytes] = {}
        self.headers: list[vision_service_pb2.EncodeHeader] = []
        self.calls: list[tuple[str, float | None]] = []
        self.estimates: list[vision_service_pb2.EstimateRequest] = []
        self.header_bytes = 0
        self.erased: list[tuple[str, str]] = []
        self.error: ServiceError | None = None

    async def Encode(self, request_iterator: Any, context: Any) -> vision_service_pb2.EncodeResponse:
        self.calls.append((request_id(), remaining_s()))
        if self.error:
            raise self.error
        requests = [request async for request in request_iterator]
        header, chunks = requests[0].header, [request.chunk for request in requests[1:]]
        self.headers.append(header)
        assert all(len(chunk) <= 1 << 20 for chunk in chunks)
        is_hit = header.media_digest in self.known
        if not chunks and not is_hit:
            raise EmbeddingNotFound("No cache holds it.", resource=header.media_digest)
        self.known.setdefault(header.media_digest, b"".join(chunks))
        is_video = header.options.HasField("video")
        frame_count = (header.options.video.segment_count or 8) if is_video else 0
        handle = embedding_pb2.EmbeddingHandle(
            # Whether somebody waits for an embedding is no part of what it is.
            digest=digest_of(header.media_digest.encode() + header.options.SerializeToString()),
            media_digest=header.media_digest,
            tile_count=frame_count or 3,
            token_count=256 * (frame_count or 3),
            frame_count=frame_count,
            hidden_size=64,
            data_type=embedding_pb2.DATA_TYPE_FLOAT32,
            source="127.0.0.1:9",
        )
        tier = embedding_pb2.CACHE_TIER_STORE if is_hit else embedding_pb2.CACHE_TIER_NONE
        spent = Duration(nanos=0 if is_hit else 5_000_000)
        return vision_service_pb2.EncodeResponse(
            handle=handle,
            cache_tier=tier,
            columns=2,
            rows=1,
            encode_duration=spent,
            queue_duration=spent,
            preprocess_duration=spent,
            frames=[embedding_pb2.VideoFrame(index=10 * number, time_seconds=number) for number in range(frame_count)],
        )

    async def FetchEmbedding(self, request: Any, context: Any) -> AsyncIterator[Any]:
        raise AssertionError("the gateway fetches no embeddings")
        yield

    async def Estimate(self, request: Any, context: Any) -> vision_service_pb2.EstimateResponse:
        self.estimates.append(request)
        if self.error:
            raise self.error
        if len(request.content) < self.header_bytes:
            raise MediaUnreadable("More of the file is needed.")
        return vision_service_pb2.EstimateResponse(
            width=640, height=480, columns=4, rows=3, tile_count=13, token_count=3328
        )

    async def Erase(self, request: Any, context: Any) -> vision_service_pb2.EraseResponse:
        self.erased.append((request.tenant, request.media_digest))
        if self.error:
            raise self.error
        is_held = self.known.pop(request.media_digest, None) is not None
        return vision_service_pb2.EraseResponse(embedding_count=1 if is_held else 0)


class ScriptedLlm(llm_service_pb2_grpc.LlmServiceServicer):
    """Answers `deltas`; raises the next of `errors` at the beginning, or `late_error` at the end; waits on `gate`.

    With `candidates` it answers their texts instead, in two deltas each, side by side. What a question's last text
    names in `refused` is refused. As a critic it scores a step by `step_scores`, 0.5 where that does not know it.
    """

    def __init__(self) -> None:
        self.requests: list[llm_service_pb2.GenerateRequest] = []
        self.calls: list[tuple[str, float | None]] = []
        self.deltas = ["A ", "cat."]
        self.errors: list[BaseException] = []
        self.late_error: ServiceError | None = None
        self.gate: asyncio.Event | None = None
        self.candidates: list[tuple[str, llm_service_pb2.CandidateResult]] = []
        self.refused: dict[str, ServiceError] = {}
        self.step_scores: dict[str, float] = {}
        self.scored: list[llm_service_pb2.ScoreTurnsRequest] = []
        self.ended, self.cancelled = 0, asyncio.Event()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[llm_service_pb2.GenerateResponse]:
        self.requests.append(request)
        self.calls.append((request_id(), remaining_s()))
        try:
            async for response in self._answer(request):
                yield response
            self.ended += 1
        except (asyncio.CancelledError, GeneratorExit):  # the latter in the middle of a write
            self.cancelled.set()
            raise

    async def _answer(self, request: Any) -> AsyncIterator[llm_service_pb2.GenerateResponse]:
        if self.errors:
            raise self.errors.pop(0)
        if error := self.refused.get(request.prompt.turns[-1].segments[-1].text):
            raise error
        ids = [1, 2, 3] if request.return_token_ids else []
        started = llm_service_pb2.GenerateStarted(model="scripted", prompt_token_count=3, prompt_token_ids=ids)
        yield llm_service_pb2.GenerateResponse(started=started)
        for index, delta in enumerate(() if self.candidates else self.deltas):
            ids = [index] if request.return_token_ids else []
            yield llm_service_pb2.GenerateResponse(delta=llm_service_pb2.GenerateDelta(text=delta, token_ids=ids))
        for half in (0, 1) if self.candidates else ():
            for index, (text, _) in enumerate(self.candidates):
                middle = len(text) // 2
                said = text[middle:] if half else text[:middle]
                delta = llm_service_pb2.GenerateDelta(
                    text=said,
                    candidate_index=index,
                    token_ids=[index] if request.return_token_ids else [],
                    logprobs=[generation_pb2.TokenLogprob(token_id=index)]
                    if request.generation_config.HasField("top_logprobs")
                    else [],
                )
                yield llm_service_pb2.GenerateResponse(delta=delta)
        if self.gate:
            await self.gate.wait()
        if self.late_error:
            raise self.late_error
        yield llm_service_pb2.GenerateResponse(finished=self._finished(request))

    def _finished(self, request: Any) -> llm_service_pb2.GenerateFinished:
        visuals = [segment.visual for turn in request.prompt.turns for segment in turn.segments]
        return llm_service_pb2.GenerateFinished(
            candidates=[result for _, result in self.candidates],
            finish_reason=generation_pb2.FINISH_REASON_STOP,
            usage=generation_pb2.TokenUsage(prompt_token_count=3, output_token_count=len(self.deltas)),
            queue_duration=Duration(nanos=1_000_000),
            prefill_duration=Duration(nanos=2_000_000),
            decode_duration=Duration(nanos=3_000_000),
            transfers=[
                llm_service_pb2.EmbeddingTransfer(
                    digest=handle.digest,
                    cache_tier=embedding_pb2.CACHE_TIER_LOCAL,
                    duration=Duration(nanos=4_000_000),
                    size_bytes=1000,
                )
                for visual in visuals
                for handle in visual.embeddings
            ],
        )

    async def ScoreTurns(self, request: Any, context: Any) -> llm_service_pb2.ScoreTurnsResponse:
        self.scored.append(request)
        if self.errors:
            raise self.errors.pop(0)
        steps = [turn.segments[-1].text for turn in request.prompt.turns if turn.role == USER]
        known = [self.step_scores.get(step.rpartition("### Solution Process:\n")[2], 0.5) for step in steps]
        turns = [llm_service_pb2.TurnScore(probabilities=[score, 1 - score]) for score in known]
        return llm_service_pb2.ScoreTurnsResponse(turns=turns, model="critic")

    async def DescribeModel(self, request: Any, context: Any) -> llm_service_pb2.DescribeModelResponse:
        return llm_service_pb2.DescribeModelResponse(model="scripted", max_context_tokens=4096)

    async def CountTokens(self, request: Any, context: Any) -> llm_service_pb2.CountTokensResponse:
        raise AssertionError("not asked for")


class Stage:
    """A scripted servicer on a server of its own, which a test can stop."""

    def __init__(self, register: Callable[[grpc.aio.Server], None]) -> None:
        registry = CallRegistry()
        registry.ready = True
        self.server = grpc.aio.server(interceptors=[CallInterceptor(registry)], options=server_options(8 << 20))
        register(self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"


class Client:
    """The stubs of a gateway and the two stages behind it."""

    def __init__(self, channel: grpc.aio.Channel, vision: ScriptedVision, llm: ScriptedLlm) -> None:
        self.channel, self.vision, self.llm = channel, vision, llm
        self.chat: Any = chat_service_pb2_grpc.ChatServiceStub(channel)
        self.conversations: Any = conversation_service_pb2_grpc.ConversationServiceStub(channel)
        self.media: Any = media_service_pb2_grpc.MediaServiceStub(channel)
        self.batches: Any = batch_service_pb2_grpc.BatchServiceStub(channel)
        self.critic_vision, self.critic = ScriptedVision(), ScriptedLlm()
        self.llm_stage: Stage
        self.vision_stage: Stage
        self.critic_stage: Stage

    async def ask(self, *parts: Any, **request: Any) -> list[chat_service_pb2.ChatResponse]:
        return [event async for event in self.chat.Chat(chat_request(*parts, **request))]

    async def conversation(self, **request: Any) -> str:
        made = await self.conversations.CreateConversation(
            conversation_service_pb2.CreateConversationRequest(**request)
        )
        return str(made.conversation.conversation_id)

    async def upload(self, digest: str, *chunks: bytes) -> media_service_pb2.UploadResponse:
        header = media_service_pb2.UploadRequest(header=media_service_pb2.UploadHeader(digest=digest))
        return await self.send_upload(header, *(media_service_pb2.UploadRequest(chunk=chunk) for chunk in chunks))

    async def send_upload(self, *requests: media_service_pb2.UploadRequest) -> Any:
        return await self.media.Upload(iter(requests))


def part(what: Any) -> content_pb2.Part:
    if isinstance(what, content_pb2.Part):
        return what
    if isinstance(what, str):
        return content_pb2.Part(text=what)
    if isinstance(what, bytes):
        return content_pb2.Part(media=content_pb2.Media(inline=what))
    return content_pb2.Part(media=what)


def message(*parts: Any, role: generation_pb2.Role.ValueType = USER) -> content_pb2.Message:
    return content_pb2.Message(role=role, parts=map(part, parts))


def chat_request(*parts: Any, **request: Any) -> chat_service_pb2.ChatRequest:
    return chat_service_pb2.ChatRequest(messages=[message(*parts)], **request)


def text_of(events: list[chat_service_pb2.ChatResponse]) -> str:
    return "".join(event.delta.text for event in events)


async def error_of(call: Awaitable[Any]) -> ServiceError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value, LlmUnavailable)


@asynccontextmanager
async def running(tmp_path: Path, redis_url: str = "redis://127.0.0.1:1", **settings: Any) -> AsyncIterator[Client]:
    """Run a gateway and its stages; yield a client once it is ready."""
    vision, llm = ScriptedVision(), ScriptedLlm()
    vision_stage, llm_stage = await stages_of(vision, llm)
    async with gateway_over(tmp_path, vision_stage.address, llm_stage.address, redis_url, **settings) as channel:
        await until_serving(channel)
        client = Client(channel, vision, llm)
        client.llm_stage, client.vision_stage = llm_stage, vision_stage
        yield client
    await vision_stage.server.stop(None)
    await llm_stage.server.stop(None)


@asynccontextmanager
async def running_with_critic(tmp_path: Path, redis_url: str = "redis://127.0.0.1:1") -> AsyncIterator[Client]:
    """Run a gateway, its stages and a critic; `critic_stage` of the client is the critic's LLM service."""
    vision, llm = ScriptedVision(), ScriptedLlm()
    stages = await stages_of(vision, llm)
    async with running(
        tmp_path, redis_url, critic_vision_target=stages[0].address, critic_llm_target=stages[1].address
    ) as client:
        client.critic_vision, client.critic, client.critic_stage = vision, llm, stages[1]
        yield client
    for stage in stages:
        await stage.server.stop(None)


async def stages_of(vision: ScriptedVision, llm: ScriptedLlm) -> tuple[Stage, Stage]:
    """Start servers for both."""
    vision_stage = Stage(lambda server: vision_service_pb2_grpc.add_VisionServiceServicer_to_server(vision, server))
    llm_stage = Stage(lambda server: llm_service_pb2_grpc.add_LlmServiceServicer_to_server(llm, server))
    await vision_stage.server.start()
    await llm_stage.server.start()
    return vision_stage, llm_stage


@asynccontextmanager
async def gateway_over(
    tmp_path: Path, vision: str, llm: str, redis_url: str, **settings: Any
) -> AsyncIterator[grpc.aio.Channel]:
    """Run a gateway as `serve` does; yield a channel to it."""
    address_file = tmp_path / "address"
    address_file.unlink(missing_ok=True)
    made = GatewaySettings(
        address_file=address_file,
        vision_target=vision,
        llm_target=llm,
        redis_url=redis_url,
        **({"redis_timeout_s": 2.0} | settings),
    )
    task = asyncio.create_task(serve(made, lifespan))
    while not address_file.exists():
        await asyncio.sleep(0.01)
        assert not task.done(), task.result()
    async with grpc.aio.insecure_channel(address_file.read_text()) as channel:
        yield channel
    if not task.done():
        os.kill(os.getpid(), signal.SIGTERM)
    await task


async def until_serving(channel: grpc.aio.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    async for update in stub.Watch(health_pb2.HealthCheckRequest(service="readiness")):
        if update.status == health_pb2.HealthCheckResponse.SERVING:
            return
