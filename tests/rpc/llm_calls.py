"""What tests of the LLM service over real channels share: the service, a scripted vision replica, and messages."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from internvl_serving.common.v1 import embedding_pb2, generation_pb2
from internvl_serving.llm.v1 import llm_service_pb2 as pb
from internvl_serving.llm.v1 import llm_service_pb2_grpc
from internvl_serving.vision.v1 import vision_service_pb2, vision_service_pb2_grpc
from llm_service.app import lifespan
from llm_service.settings import LlmSettings
from shared.errors import LlmUnavailable, ServiceError
from shared.rpc.channel import open_channel
from shared.rpc.handles import HandleSigner
from shared.rpc.server import serve
from shared.rpc.status import from_rpc_error
from tests.golden_cases import CHECKPOINTS, GOLDEN

CHECKPOINT = GOLDEN / "checkpoints" / CHECKPOINTS[0]
TOKENS_PER_TILE, HIDDEN = 4, 64


class ScriptedVision(vision_service_pb2_grpc.VisionServiceServicer):
    """Streams what it holds by digest, or zeros, and cannot encode. Notes what it was asked for."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.content: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.tile_count = 1
        self.hidden_size = HIDDEN
        self.num_rows = TOKENS_PER_TILE

    async def FetchEmbedding(self, request: Any, context: Any) -> AsyncIterator[Any]:
        digest = request.handle.digest
        self.asked.append(digest)
        if digest not in self.held:
            await context.abort(grpc.StatusCode.NOT_FOUND, "gone")
        header = vision_service_pb2.FetchEmbeddingHeader(
            tile_count=self.tile_count,
            token_count=self.tile_count * TOKENS_PER_TILE,
            hidden_size=self.hidden_size,
            data_type=embedding_pb2.DATA_TYPE_FLOAT32,
        )
        yield vision_service_pb2.FetchEmbeddingResponse(header=header)
        if digest in self.content:
            yield vision_service_pb2.FetchEmbeddingResponse(chunk=self.content[digest])
            return
        for _ in range(self.num_rows):
            yield vision_service_pb2.FetchEmbeddingResponse(chunk=bytes(HIDDEN * 4))


@asynccontextmanager
async def running(tmp_path: Path, checkpoint: Path = CHECKPOINT, **settings: Any) -> AsyncIterator[Any]:
    address_file = tmp_path / "llm"
    chosen = LlmSettings(model=checkpoint, address_file=address_file, kv_cache_bytes=16 << 20, **settings)
    task = asyncio.create_task(serve(chosen, lifespan))
    while not address_file.exists():
        await asyncio.sleep(0.01)
        assert not task.done(), task.result()
    async with open_channel(address_file.read_text(), 8 << 20) as channel:
        stub = llm_service_pb2_grpc.LlmServiceStub(channel)
        await stub.CountTokens(pb.CountTokensRequest(prompt=prompt("Hi")), wait_for_ready=True)
        yield stub
    os.kill(os.getpid(), signal.SIGTERM)
    await task


@asynccontextmanager
async def vision() -> AsyncIterator[tuple[ScriptedVision, str]]:
    servicer, server = ScriptedVision(), grpc.aio.server()
    vision_service_pb2_grpc.add_VisionServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield servicer, f"127.0.0.1:{port}"
    await server.stop(None)


def prompt(*texts: str, system_message: str | None = None) -> pb.Prompt:
    roles = (generation_pb2.ROLE_USER, generation_pb2.ROLE_ASSISTANT)
    said = [pb.Turn(role=roles[index % 2], segments=[pb.Segment(text=text)]) for index, text in enumerate(texts)]
    return pb.Prompt(turns=said, system_message=system_message)


def picture_prompt(handle: embedding_pb2.EmbeddingHandle) -> pb.Prompt:
    segments = [pb.Segment(visual=pb.VisualSegment(embeddings=[handle])), pb.Segment(text="\nWhat is it?")]
    return pb.Prompt(turns=[pb.Turn(role=generation_pb2.ROLE_USER, segments=segments)])


def handle(source: str, digest: str = "ab" * 32, **changes: Any) -> embedding_pb2.EmbeddingHandle:
    """Return a handle as a vision service without a key signs it."""
    fields = {
        "digest": digest,
        "media_digest": "cd" * 32,
        "expire_time": Timestamp(seconds=1 << 33),
        "tile_count": 1,
        "token_count": TOKENS_PER_TILE,
        "hidden_size": HIDDEN,
        "data_type": embedding_pb2.DATA_TYPE_FLOAT32,
        "source": source,
    }
    issued = embedding_pb2.EmbeddingHandle(**(fields | changes))
    HandleSigner("").sign(issued)
    return issued


def request(asked: pb.Prompt, **config: Any) -> pb.GenerateRequest:
    generation_config = generation_pb2.GenerationConfig(**({"max_output_tokens": 8} | config))
    return pb.GenerateRequest(prompt=asked, generation_config=generation_config, return_token_ids=True)


async def text_of(call: Any) -> str:
    """Return the whole answer; in how many pieces it comes is a matter of time."""
    return "".join([event.delta.text async for event in call])


async def error_of(call: Any) -> ServiceError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return from_rpc_error(caught.value, LlmUnavailable)
