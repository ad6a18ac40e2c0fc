"""What a service says of its health while it loads, serves, stands still and drains."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from internvl_serving.llm.v1 import llm_service_pb2, llm_service_pb2_grpc
from shared.rpc.health import HealthChecks
from shared.rpc.server import Application, serve
from shared.settings import ServiceSettings
from shared.stall import Progress

SERVICE = "internvl_serving.llm.v1.LlmService"
NAMES = ("startup", "readiness", "liveness", "", SERVICE)


class Streaming(llm_service_pb2_grpc.LlmServiceServicer):
    """Has one call that lasts until the test lets it end."""

    def __init__(self) -> None:
        self.begun, self.end = asyncio.Event(), asyncio.Event()

    async def CountTokens(self, request: Any, context: Any) -> llm_service_pb2.CountTokensResponse:
        self.begun.set()
        await self.end.wait()
        return llm_service_pb2.CountTokensResponse()


class Part:
    """A model that has come as far as the test says."""

    def __init__(self) -> None:
        self.now = Progress(0, has_work=False)

    def progress(self) -> Progress:
        return self.now


class Probe:
    """Asks a health port."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._checks = health_pb2_grpc.HealthStub(channel)

    async def good(self) -> set[str]:
        """The names that are SERVING."""
        return {name for name in NAMES if await self._is_good(name)}

    async def until(self, name: str, *, good: bool) -> None:
        async for answer in self._checks.Watch(health_pb2.HealthCheckRequest(service=name)):
            if (answer.status == health_pb2.HealthCheckResponse.SERVING) == good:
                return

    async def _is_good(self, name: str) -> bool:
        answer = await self._checks.Check(health_pb2.HealthCheckRequest(service=name))
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@asynccontextmanager
async def running(
    tmp_path: Path,
    servicer: Streaming | None = None,
    warm_up: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0),
    parts: tuple[Callable[[], Progress], ...] = (),
    **settings: Any,
) -> AsyncIterator[tuple[Probe, str, asyncio.Task[None]]]:
    """Run a service with a health port; yield what asks that, where calls go, and the service's task."""

    @asynccontextmanager
    async def lifespan(settings: ServiceSettings, address: str, registry: Any) -> AsyncIterator[Application]:
        yield Application(
            lambda server: llm_service_pb2_grpc.add_LlmServiceServicer_to_server(servicer or Streaming(), server),
            [SERVICE],
            warm_up,
            parts=parts,
        )

    address_file, health_file = tmp_path / "address", tmp_path / "health"
    chosen = ServiceSettings(
        address_file=address_file, health_listen="127.0.0.1:0", health_address_file=health_file, **settings
    )
    task = asyncio.create_task(serve(chosen, lifespan))
    while not address_file.exists():
        await asyncio.sleep(0.01)
        assert not task.done(), task.result()
    async with grpc.aio.insecure_channel(health_file.read_text()) as channel:
        yield Probe(channel), address_file.read_text(), task
    if not task.done():
        os.kill(os.getpid(), signal.SIGTERM)
        await task


async def test_a_service_that_loads_is_alive_and_not_started(tmp_path: Path) -> None:
    loaded = asyncio.Event()
    async with running(tmp_path, warm_up=loaded.wait) as (probe, _, _):
        assert await probe.good() == {"liveness"}
        loaded.set()
        await probe.until("readiness", good=True)
        assert await probe.good() == set(NAMES)


async def test_a_service_that_drains_is_alive_and_started_and_not_ready(tmp_path: Path) -> None:
    servicer = Streaming()
    async with running(tmp_path, servicer) as (probe, address, task):
        await probe.until("readiness", good=True)
        async with grpc.aio.insecure_channel(address) as channel:
            call = llm_service_pb2_grpc.LlmServiceStub(channel).CountTokens(llm_service_pb2.CountTokensRequest())
            await servicer.begun.wait()
            os.kill(os.getpid(), signal.SIGTERM)
            await probe.until("readiness", good=False)
            assert await probe.good() == {"startup", "liveness"}
            servicer.end.set()
            await call
        await task


async def test_a_part_that_stands_still_makes_the_service_not_ready_and_then_not_alive_until_it_moves(
    tmp_path: Path,
) -> None:
    part = Part()
    async with running(tmp_path, parts=(part.progress,), part_stall_s=4.0) as (probe, _, _):
        await probe.until("readiness", good=True)
        part.now = Progress(1, has_work=True)
        await probe.until("readiness", good=False)
        assert await probe.good() == {"startup", "liveness"}
        await probe.until("liveness", good=False)
        assert await probe.good() == {"startup"}
        part.now = Progress(2, has_work=True)
        await probe.until("liveness", good=True)
        assert await probe.good() == set(NAMES)


async def test_the_part_that_has_stood_still_longest_counts(tmp_path: Path) -> None:
    stuck, idle = Part(), Part()
    stuck.now = Progress(3, has_work=True)
    async with running(tmp_path, parts=(idle.progress, stuck.progress), part_stall_s=2.0) as (probe, _, _):
        await probe.until("liveness", good=False)


async def test_a_part_that_moves_again_does_not_make_a_draining_service_ready() -> None:
    checks, server = HealthChecks(), grpc.aio.server()
    checks.add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await checks.begin([SERVICE])
    await checks.serve()
    await checks.heed(stalled_s=6.0, stall_s=10.0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        probe = Probe(channel)
        assert await probe.good() == {"startup", "liveness"}
        await checks.drain(is_broken=False)
        await checks.heed(stalled_s=0.0, stall_s=10.0)
        assert await probe.good() == {"startup", "liveness"}
        await checks.drain(is_broken=True)
        assert await probe.good() == {"startup"}
    await server.stop(None)


async def test_a_health_port_that_is_taken_is_named_with_its_setting(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        settings = ServiceSettings(health_listen=address)

        @asynccontextmanager
        async def lifespan(settings: ServiceSettings, address: str, registry: Any) -> AsyncIterator[Application]:
            raise AssertionError("it must not come so far")
            yield

        with pytest.raises(OSError, match=f"{address}.*--health-listen"):
            await serve(settings, lifespan)
