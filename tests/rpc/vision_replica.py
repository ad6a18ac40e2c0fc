"""A vision service in this process, on a tiny golden checkpoint, and a client of it."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from internvl_serving.common.v1.embedding_pb2 import EmbeddingHandle, PreprocessOptions
from internvl_serving.vision.v1.vision_service_pb2 import (
    EncodeHeader,
    EncodeRequest,
    EncodeResponse,
    FetchEmbeddingRequest,
    FetchEmbeddingResponse,
)
from internvl_serving.vision.v1.vision_service_pb2_grpc import VisionServiceStub
from shared.digest import digest_of
from shared.errors import ServiceError, VisionUnavailable
from shared.rpc.channel import open_channel
from shared.rpc.server import serve
from shared.rpc.status import from_rpc_error
from vision_service.app import lifespan
from vision_service.settings import VisionSettings

TINY = Path(__file__).parents[1] / "golden/checkpoints/internvl3-8b-tiny"


@dataclass(frozen=True)
class Replica:
    stub: Any
    address: str
    redis_url: str

    async def encode(
        self, content: bytes | None, media_digest: str = "", chunk_bytes: int = 1000, **options: Any
    ) -> EncodeResponse:
        """Send the header and, unless `content` is None, the bytes in chunks."""
        digest = media_digest or digest_of(content or b"")
        header = EncodeHeader(media_digest=digest, options=PreprocessOptions(**options))
        starts = range(0, len(content), chunk_bytes) if content else ()
        chunks = [EncodeRequest(chunk=(content or b"")[start : start + chunk_bytes]) for start in starts]
        response: EncodeResponse = await self.send(EncodeRequest(header=header), *chunks)
        return response

    async def send(self, *messages: EncodeRequest) -> EncodeResponse:
        response: EncodeResponse = await self.stub.Encode(iter(messages), wait_for_ready=True)
        return response

    async def fetch(self, handle: EmbeddingHandle) -> list[FetchEmbeddingResponse]:
        return [message async for message in self.stub.FetchEmbedding(FetchEmbeddingRequest(handle=handle))]


@asynccontextmanager
async def replica(tmp_path: Path, **settings: Any) -> AsyncIterator[Replica]:
    address_file = tmp_path / "address"
    address_file.unlink(missing_ok=True)
    task = asyncio.create_task(
        serve(VisionSettings(model=TINY, address_file=address_file, log_level="warning", **settings), lifespan)
    )
    while not address_file.exists():
        await asyncio.sleep(0.01)
        assert not task.done(), task.result()
    address = address_file.read_text()
    async with open_channel(address, 8 << 20) as channel:
        at = Replica(VisionServiceStub(channel), address, str(settings.get("redis_url", "")))
        await until_ready(at)
        yield at
    os.kill(os.getpid(), signal.SIGTERM)
    await task


async def until_ready(at: Replica) -> None:
    while True:
        try:
            await at.fetch(EmbeddingHandle())
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:  # nobody issued this handle
                return
        await asyncio.sleep(0.02)


async def error_of(call: Awaitable[Any]) -> ServiceError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value, VisionUnavailable)


def visual_tokens_of(messages: list[FetchEmbeddingResponse]) -> torch.Tensor:
    header, chunks = messages[0].header, messages[1:]
    payload = bytearray(b"".join(message.chunk for message in chunks))
    return torch.frombuffer(payload, dtype=torch.float32).view(header.token_count, header.hidden_size)
