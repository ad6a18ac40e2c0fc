"""The server that every service runs in: readiness, errors, deadlines, drain; over real channels."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from internvl_serving.llm.v1 import llm_service_pb2, llm_service_pb2_grpc
from shared.errors import InternalError, InvalidRequest, LlmUnavailable, NotReady, QueueFull, ServiceError
from shared.rpc.channel import open_channel
from shared.rpc.deadline import outgoing, remaining_s, request_id
from shared.rpc.server import Application, serve
from shared.rpc.status import from_rpc_error
from shared.settings import ServiceSettings

SERVICE = "internvl_serving.llm.v1.LlmService"


class ScriptedServicer(llm_service_pb2_grpc.LlmServiceServicer):
    """Does what the test says: `on_count` answers CountTokens, Generate streams `deltas` with a pause between."""

    def __init__(self, on_count: Callable[[], Any] = lambda: None, deltas: int = 3, pause_s: float = 0.0) -> None:
        self.on_count, self.deltas, self.pause_s = on_count, deltas, pause_s
        self.cancelled = asyncio.Event()

    async def CountTokens(self, request: Any, context: Any) -> llm_service_pb2.CountTokensResponse:
        value = self.on_count()
        return llm_service_pb2.CountTokensResponse(token_count=value or 0)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[llm_service_pb2.GenerateResponse]:
        try:
            for index in range(self.deltas):
                yield llm_service_pb2.GenerateResponse(delta=llm_service_pb2.GenerateDelta(text=str(index)))
                await asyncio.sleep(self.pause_s)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


@asynccontextmanager
async def running(
    tmp_path: Path,
    servicer: ScriptedServicer,
    warm_up: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0),
    drain_grace_s: float = 5.0,
) -> AsyncIterator[tuple[Any, str, asyncio.Task[None]]]:
    """Run `serve` as a task; yield a stub, the address and the task."""

    @asynccontextmanager
    async def lifespan(settings: ServiceSettings, address: str) -> AsyncIterator[Application]:
        yield Application(
            lambda server: llm_service_pb2_grpc.add_LlmServiceServicer_to_server(servicer, server), [SERVICE], warm_up
        )

    address_file = tmp_path / "address"
    settings = ServiceSettings(address_file=address_file, drain_grace_s=drain_grace_s)
    task = asyncio.create_task(serve(settings, lifespan))
    while not address_file.exists():
        await asyncio.sleep(0.01)
        assert not task.done(), task.result()
    async with open_channel(address_file.read_text(), 8 << 20) as channel:
        yield llm_service_pb2_grpc.LlmServiceStub(channel), address_file.read_text(), task
    if not task.done():
        os.kill(os.getpid(), signal.SIGTERM)
        await task


async def until_serving(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        async for update in stub.Watch(health_pb2.HealthCheckRequest(service="readiness")):
            if update.status == health_pb2.HealthCheckResponse.SERVING:
                return


async def error_of(call: Awaitable[Any]) -> ServiceError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value, LlmUnavailable)


REQUEST = llm_service_pb2.CountTokensRequest()


async def test_health_says_not_serving_until_warm_up_has_ended(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with running(tmp_path, ScriptedServicer(), warm_up=lambda: gate.wait()) as (stub, address, _):
        async with grpc.aio.insecure_channel(address) as channel:
            checks = health_pb2_grpc.HealthStub(channel)
            answer = await checks.Check(health_pb2.HealthCheckRequest(service="readiness"))
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
            alive = await checks.Check(health_pb2.HealthCheckRequest(service="liveness"))
            assert alive.status == health_pb2.HealthCheckResponse.SERVING
            direct = llm_service_pb2_grpc.LlmServiceStub(channel)
            assert isinstance(await error_of(direct.CountTokens(REQUEST)), NotReady)
        gate.set()
        await until_serving(address)
        await stub.CountTokens(REQUEST, wait_for_ready=True)


async def test_our_errors_cross_the_wire_with_reason_and_detail(tmp_path: Path) -> None:
    errors: list[ServiceError] = [
        InvalidRequest("No.", field="prompt.turns"),
        QueueFull("Later.", retry_after_s=1.5),
    ]

    def fail() -> None:
        raise errors[0]

    async with running(tmp_path, ScriptedServicer(fail)) as (stub, address, _):
        await until_serving(address)
        bad = await error_of(stub.CountTokens(REQUEST, wait_for_ready=True))
        assert (type(bad), bad.message, bad.field) == (InvalidRequest, "No.", "prompt.turns")
        errors.pop(0)
        full = await error_of(stub.CountTokens(REQUEST))
        assert (type(full), full.retry_after_s) == (QueueFull, 1.5)


async def test_an_unknown_error_tells_the_client_nothing_of_its_text(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("/secret/path at 0xdeadbeef")

    async with running(tmp_path, ScriptedServicer(fail)) as (stub, address, _):
        await until_serving(address)
        error = await error_of(stub.CountTokens(REQUEST, wait_for_ready=True))
        assert isinstance(error, InternalError)
        assert "secret" not in error.message


async def test_deadline_and_request_id_reach_the_handler_and_what_it_calls(tmp_path: Path) -> None:
    seen: list[Any] = []
    async with running(tmp_path, ScriptedServicer(lambda: seen.append((remaining_s(), request_id(), outgoing())))) as (
        stub,
        address,
        _,
    ):
        await until_serving(address)
        await stub.CountTokens(REQUEST, timeout=3.0, metadata=(("x-request-id", "abc-1"),), wait_for_ready=True)
        remaining, identity, options = seen[0]
        assert 0 < remaining <= 3.0
        assert identity == "abc-1"
        assert 0 < options["timeout"] < remaining + 0.01
        assert ("x-request-id", "abc-1") in options["metadata"]


async def test_sigterm_lets_a_running_stream_finish_and_refuses_new_calls(tmp_path: Path) -> None:
    async with running(tmp_path, ScriptedServicer(deltas=8, pause_s=0.1)) as (stub, address, task):
        await until_serving(address)
        call = stub.Generate(llm_service_pb2.GenerateRequest(), wait_for_ready=True)
        stream = aiter(call)
        received = [(await anext(stream)).delta.text]
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.1)
        async with grpc.aio.insecure_channel(address) as channel:
            late = llm_service_pb2_grpc.LlmServiceStub(channel).CountTokens(REQUEST)
            assert isinstance(await error_of(late), NotReady)
        received += [message.delta.text async for message in stream]
        assert received == [str(index) for index in range(8)]
        await task


async def test_a_stream_longer_than_the_grace_ends_with_our_own_error(tmp_path: Path) -> None:
    async with running(tmp_path, ScriptedServicer(deltas=1000, pause_s=0.05), drain_grace_s=0.3) as (
        stub,
        address,
        task,
    ):
        await until_serving(address)
        call = stub.Generate(llm_service_pb2.GenerateRequest(), wait_for_ready=True)
        stream = aiter(call)
        await anext(stream)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stream:
                pass
        assert isinstance(from_rpc_error(caught.value, LlmUnavailable), NotReady)
        await task


async def test_a_cancelled_call_cancels_its_handler(tmp_path: Path) -> None:
    servicer = ScriptedServicer(deltas=1000, pause_s=0.05)
    async with running(tmp_path, servicer) as (stub, address, _):
        await until_serving(address)
        call = stub.Generate(llm_service_pb2.GenerateRequest(), wait_for_ready=True)
        await call.read()
        call.cancel()
        await asyncio.wait_for(servicer.cancelled.wait(), 0.5)
