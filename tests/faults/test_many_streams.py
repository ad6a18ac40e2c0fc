"""More streams at once than a gateway takes on: each is answered or refused with a time to come back, and none is lost.

A real gateway process between scripted stages, whose LLM service waits until it is told to go on.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from deploy.local.service import Service
from internvl_serving.gateway.v1 import chat_service_pb2_grpc
from shared.errors import ClientTooSlow, LlmUnavailable, QueueFull, ServiceError
from shared.rpc.channel import open_channel
from shared.rpc.status import from_rpc_error
from tests.rpc.scripted_stages import ScriptedLlm, ScriptedVision, chat_request, stages_of, text_of

pytestmark = pytest.mark.e2e
STREAMS, RUNNING, WAITING = 400, 50, 150
NARROW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_535), ("grpc.use_local_subchannel_pool", 1)]


@contextmanager
def gateway_process(tmp_path: Path, vision: str, llm: str, **settings: float) -> Iterator[Service]:
    flags = ["--listen", "127.0.0.1:0", "--vision-target", vision, "--llm-target", llm, "--log-format", "json"]
    flags += [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    service = Service("gateway", "gateway", flags, {"GATEWAY_REDIS_URL": "redis://127.0.0.1:1"}, tmp_path)
    try:
        yield service
    finally:
        service.process.kill()


@asynccontextmanager
async def gateway(tmp_path: Path, **settings: float) -> AsyncIterator[tuple[str, ScriptedLlm, Service]]:
    """A gateway process that is ready, and the LLM service behind it."""
    llm = ScriptedLlm()
    stages = await stages_of(ScriptedVision(), llm)
    with gateway_process(tmp_path, stages[0].address, stages[1].address, **settings) as service:
        deadline = time.monotonic() + 120
        # It asks the stages before it is ready, so they have to be able to answer meanwhile.
        while not await asyncio.to_thread(service.is_ready):
            assert time.monotonic() < deadline, service.process.last_lines(20)
            await asyncio.sleep(0.1)
        assert service.address is not None
        yield service.address, llm, service
    for stage in stages:
        await stage.server.stop(None)


async def ask(stub: Any, deadline_s: float = 120.0) -> str | ServiceError:
    """Return the whole answer, or what the call ended with in its place."""
    try:
        events = [event async for event in stub.Chat(chat_request("Hello?"), timeout=deadline_s)]
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error, LlmUnavailable)
    assert events[-1].HasField("finished")
    return text_of(events)


@pytest.mark.parametrize("channels", [1, 20])
async def test_of_many_streams_at_once_each_is_answered_or_told_when_to_come_back(
    tmp_path: Path, channels: int
) -> None:
    limits = {"max_running_turns": RUNNING, "max_waiting_turns": WAITING, "max_wait_s": 100}
    async with gateway(tmp_path, **limits) as (address, llm, _), AsyncExitStack() as stack:
        stubs = [
            chat_service_pb2_grpc.ChatServiceStub(await stack.enter_async_context(open_channel(address, 8 << 20)))
            for _ in range(channels)
        ]
        llm.gate = asyncio.Event()
        calls = [asyncio.create_task(ask(stubs[number % channels])) for number in range(STREAMS)]
        while sum(call.done() for call in calls) < STREAMS - RUNNING - WAITING:
            await asyncio.sleep(0.02)
        assert len(llm.requests) <= RUNNING
        llm.gate.set()
        ended = await asyncio.gather(*calls)
        refused = [error for error in ended if isinstance(error, QueueFull)]
        assert Counter(map(str, ended))["A cat."] == RUNNING + WAITING
        assert len(refused) == STREAMS - RUNNING - WAITING
        hints = [error.retry_after_s for error in refused]
        assert all(hint is not None and hint > 0 for hint in hints)
        assert len(set(hints)) > len(hints) / 2  # not all of them come back together
        assert await ask(stubs[0]) == "A cat."


async def test_readers_that_stop_cost_neither_places_nor_other_readers_their_answers(tmp_path: Path) -> None:
    slow, quick = 10, 10
    settings = {"client_stall_s": 1.0, "max_running_turns": slow}
    async with gateway(tmp_path, **settings) as (address, llm, _), AsyncExitStack() as stack:
        llm.deltas = ["word " * 800] * 400
        stopped = []
        for _ in range(slow):
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options=NARROW))
            answer = aiter(chat_service_pb2_grpc.ChatServiceStub(channel).Chat(chat_request("Go on")))
            await anext(answer)
            stopped.append(answer)
        # All places are held by those who do not read.
        stub = chat_service_pb2_grpc.ChatServiceStub(await stack.enter_async_context(open_channel(address, 8 << 20)))
        answers = await asyncio.gather(*(ask(stub) for _ in range(quick)))
        assert answers == ["".join(llm.deltas)] * quick
        for answer in stopped:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in answer:
                    pass
            assert isinstance(from_rpc_error(caught.value, LlmUnavailable), ClientTooSlow)
