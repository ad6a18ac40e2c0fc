"""The server that every service runs in: readiness, errors, deadlines, drain; over real channels."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from internvl_serving.llm.v1 import llm_service_pb2, llm_service_pb2_grpc
from shared.errors import InternalError, InvalidRequest, LlmUnavailable, NotReady, QueueFull, ServiceError
from shared.metrics import Registry
from shared.rpc.channel import open_channel
from shared.rpc.deadline import outgoing, remaining_s, request_id
from shared.rpc.server import Application, PartStopped, serve
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
    broken: asyncio.Event | None = None,
    address_file: Path | None = None,
    **more: Any,
) -> AsyncIterator[tuple[Any, str, asyncio.Task[None]]]:
    """Run `serve` as a task, with `more` settings; yield a stub, the address and the task."""

    @asynccontextmanager
    async def lifespan(settings: ServiceSettings, address: str, registry: Registry) -> AsyncIterator[Application]:
        yield Application(
            lambda server: llm_service_pb2_grpc.add_LlmServiceServicer_to_server(servicer, server),
            [SERVICE],
            warm_up,
            broken or asyncio.Event(),
        )

    address_file = address_file or tmp_path / "address"
    settings = ServiceSettings(address_file=address_file, drain_grace_s=drain_grace_s, **more)
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


async def test_a_second_signal_cuts_the_drain_and_calls_still_end_with_our_own_error(tmp_path: Path) -> None:
    async with running(tmp_path, ScriptedServicer(deltas=10_000, pause_s=0.05), drain_grace_s=600) as (
        stub,
        address,
        task,
    ):
        await until_serving(address)
        stream = aiter(stub.Generate(llm_service_pb2.GenerateRequest(), wait_for_ready=True))
        await anext(stream)
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(3):
            await anext(stream)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stream:
                pass
        assert isinstance(from_rpc_error(caught.value, LlmUnavailable), NotReady)
        await asyncio.wait_for(task, 10)


async def test_a_service_whose_part_has_stopped_says_so_and_ends(tmp_path: Path) -> None:
    broken = asyncio.Event()
    servicer = ScriptedServicer(deltas=10_000, pause_s=0.05)
    async with running(tmp_path, servicer, drain_grace_s=600, broken=broken) as (stub, address, task):
        await until_serving(address)
        stream = aiter(stub.Generate(llm_service_pb2.GenerateRequest(), wait_for_ready=True))
        await anext(stream)
        broken.set()
        async with grpc.aio.insecure_channel(address) as channel:
            checks = health_pb2_grpc.HealthStub(channel)
            for name in ("readiness", "liveness", ""):
                answer = await checks.Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING, name
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stream:
                pass
        assert isinstance(from_rpc_error(caught.value, LlmUnavailable), NotReady)
        with pytest.raises(PartStopped):
            await asyncio.wait_for(task, 10)


async def test_two_address_files_that_differ_in_their_suffix_do_not_share_a_partial_file(tmp_path: Path) -> None:
    (tmp_path / "stack.partial").mkdir()
    for name in ("stack.llm", "stack.vision"):
        file = tmp_path / name
        async with running(tmp_path, ScriptedServicer(), address_file=file) as (_, address, _):
            assert file.read_text() == address
    assert sorted(file.name for file in tmp_path.iterdir()) == ["stack.llm", "stack.partial", "stack.vision"]


def scraped(address: str) -> dict[str, float]:
    """Ask a service for its metrics; return the value of every series."""
    connection = HTTPConnection(address, timeout=10)
    try:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    finally:
        connection.close()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


async def test_a_service_can_be_asked_for_its_metrics_until_it_ends(tmp_path: Path) -> None:
    gate, file = asyncio.Event(), tmp_path / "metrics"
    settings = {"metrics_listen": "127.0.0.1:0", "metrics_address_file": file}
    async with running(tmp_path, ScriptedServicer(), warm_up=lambda: gate.wait(), **settings) as (stub, address, task):
        loading = await asyncio.to_thread(scraped, file.read_text())
        assert loading["process_resident_memory_bytes"] > 0
        gate.set()
        await until_serving(address)
        await stub.CountTokens(REQUEST, wait_for_ready=True)
        values = await asyncio.to_thread(scraped, file.read_text())
        rpc = 'rpc="LlmService/CountTokens"'
        assert values[f'internvl_rpc_finished_total{{code="OK",{rpc}}}'] >= 1
        assert values[f"internvl_rpc_in_progress{{{rpc}}}"] == 0
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(task, 10)
        with pytest.raises(OSError, match="refused"):
            await asyncio.to_thread(scraped, file.read_text())


async def test_nothing_listens_for_those_who_ask_for_metrics_unless_told_to(tmp_path: Path) -> None:
    file = tmp_path / "metrics"
    async with running(tmp_path, ScriptedServicer(), metrics_address_file=file) as (_, address, _):
        await until_serving(address)
        assert not file.exists()


def test_a_port_for_metrics_that_is_taken_is_one_line_that_names_the_setting(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with started("", tmp_path / "address", METRICS=address) as process:
            errors = process.communicate(timeout=20)[1].decode()
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith(f"example: cannot listen on {address}")
    assert "--metrics-listen" in errors.splitlines()[-1]
    assert "Traceback" not in errors


SCRIPT = """
import asyncio, os, sys, time
from contextlib import asynccontextmanager
from pathlib import Path
from internvl_serving.llm.v1 import llm_service_pb2_grpc
from shared.errors import CheckpointError
from shared.rpc.server import Application, run
from shared.settings import ServiceSettings

class Servicer(llm_service_pb2_grpc.LlmServiceServicer):
    async def CountTokens(self, request, context):
        raise ValueError("a long line for the log")

def register(server):
    llm_service_pb2_grpc.add_LlmServiceServicer_to_server(Servicer(), server)

async def warm_up():
    pass

async def close():
    pass

broken = asyncio.Event()
BODY

@asynccontextmanager
async def lifespan(settings, address, registry):
    yield Application(register, ["internvl_serving.llm.v1.LlmService"], warm_up, broken)
    await close()

metrics = os.environ.get("METRICS", "")
run(
    ServiceSettings(
        log_format="json", address_file=Path(sys.argv[1]), drain_grace_s=600, metrics_listen=metrics
    ),
    "example",
    lifespan,
)
"""


@contextmanager
def started(body: str, address_file: Path, **environment: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a service as a process with `body` in its place of the script; it is gone afterwards."""
    command = [sys.executable, "-c", SCRIPT.replace("BODY", body), str(address_file)]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], env=os.environ | environment, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


async def listening(process: "subprocess.Popen[bytes]", address_file: Path) -> str:
    while not address_file.exists():
        assert process.poll() is None
        await asyncio.sleep(0.02)
    return address_file.read_text()


LOADING = """
async def warm_up():
    await asyncio.to_thread(time.sleep, 30)
"""


async def test_sigterm_while_a_thread_is_loading_ends_the_process_promptly(tmp_path: Path) -> None:
    with started(LOADING, tmp_path / "address") as process:
        await listening(process, tmp_path / "address")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 0


async def test_a_broken_service_ends_its_process_with_one_line_although_a_thread_goes_on(tmp_path: Path) -> None:
    body = """
async def warm_up():
    asyncio.get_running_loop().run_in_executor(None, time.sleep, 30)
    asyncio.get_running_loop().call_later(0.1, broken.set)
"""
    with started(body, tmp_path / "address") as process:
        errors = process.communicate(timeout=20)[1].decode().splitlines()
    assert process.returncode == 1
    assert errors[-1] == "example: a part that it cannot work without has stopped; see the log."


@pytest.mark.parametrize(
    ("body", "line", "logged"),
    [
        ("async def warm_up(): raise CheckpointError('no such tensor')", "example: no such tensor", False),
        (
            "async def warm_up():\n    secret = 'CANARY'\n    raise KeyError(1)",
            "example: could not start: KeyError; see the log above.",
            True,
        ),
        (
            "def register(server):\n    secret = 'CANARY'\n    raise KeyError(1)",
            "example: could not start: KeyError; see the log above.",
            True,
        ),
        (
            "async def warm_up():\n    async with asyncio.TaskGroup() as group:\n        1 / 0",
            "example: could not start: ZeroDivisionError; see the log above.",
            True,
        ),
        ("async def warm_up(): raise TimeoutError", "example: could not start: TimeoutError; see the log above.", True),
        (
            "async def warm_up(): broken.set()\nasync def close(): raise KeyError(1)",
            "example: failed while it stopped: KeyError; see the log above.",
            True,
        ),
    ],
)
def test_what_keeps_a_service_from_running_is_its_last_line(body: str, line: str, logged: bool, tmp_path: Path) -> None:
    with started(body, tmp_path / "address") as process:
        errors = process.communicate(timeout=20)[1].decode()
    assert process.returncode == 1
    assert errors.splitlines()[-1] == line
    assert ('"exception"' in errors) == logged
    assert "Traceback" not in errors
    assert "never awaited" not in errors
    assert "CANARY" not in errors


def test_an_address_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with started("", tmp_path / "absent" / "address") as process:
        errors = process.communicate(timeout=20)[1].decode()
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("example: ")
    assert "absent" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert "never awaited" not in errors


async def test_a_log_that_nobody_reads_stops_neither_calls_nor_the_end(tmp_path: Path) -> None:
    with started("", tmp_path / "address") as process:
        address = await listening(process, tmp_path / "address")
        await until_serving(address)
        async with open_channel(address, 8 << 20) as channel:
            stub = llm_service_pb2_grpc.LlmServiceStub(channel)
            for _ in range(300):  # more than twice what a pipe holds
                error = await error_of(stub.CountTokens(REQUEST, timeout=20))
                assert isinstance(error, InternalError)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
