"""Three LLM replicas as processes behind a gateway: killed, frozen, restarted and added while turns go on."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from deploy.local.service import Service
from internvl_serving.gateway.v1 import chat_service_pb2, chat_service_pb2_grpc
from tests.rpc.scripted_stages import chat_request, error_of, gateway_over, text_of, until_serving

pytestmark = pytest.mark.e2e


class Fleet:
    """The replicas, which can be told from one another by what they answer: their process ids."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory = directory
        self._stack = stack
        self.services = [self._started(number, "127.0.0.1:0") for number in range(3)]

    @property
    def addresses(self) -> list[str]:
        return [str(service.address) for service in self.services]

    def restart(self, number: int) -> None:
        """Start a replica that has ended where it listened."""
        address = self.addresses[number]
        (self._directory / f"llm-{number}.address").unlink()
        self.services[number] = self._started(number, address)

    def terminate(self, number: int) -> None:
        self.services[number].process.terminate()

    def _started(self, number: int, listen: str) -> Service:
        flags = ["--listen", listen, "--directory", str(self._directory), "--drain-grace-s", "5"]
        service = Service(f"llm-{number}", "tests.faults.scripted_llm", flags, {}, self._directory)
        self._stack.callback(service.process.kill)
        return service


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with ExitStack() as stack:
        yield Fleet(tmp_path, stack)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.05)


class Stream:
    """An answer on its way."""

    def __init__(self, call: Any) -> None:
        self._call, self._events = call, aiter(call)

    async def next(self) -> chat_service_pb2.ChatResponse:
        event: chat_service_pb2.ChatResponse = await anext(self._events)
        return event

    async def rest(self) -> str:
        return text_of([event async for event in self._events]).strip()

    def cancel(self) -> None:
        self._call.cancel()


class Gateway:
    """A gateway's chat, as its clients use it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = chat_service_pb2_grpc.ChatServiceStub(channel)

    def stream(self, *parts: str) -> Stream:
        return Stream(self._stub.Chat(chat_request(*parts), timeout=100))

    async def ask(self, *parts: str) -> str:
        """Return the whole answer."""
        return await self.stream(*parts).rest()

    async def endless(self) -> tuple[int, Stream]:
        """Begin a stream that does not end by itself; return who answers it, too."""
        stream = self.stream("endless")
        assert (await stream.next()).started
        return int((await stream.next()).delta.text), stream


@asynccontextmanager
async def gateway_of(fleet: Fleet, tmp_path: Path, **settings: Any) -> AsyncIterator[Gateway]:
    await until(lambda: all(fleet.addresses) and all(service.is_ready() for service in fleet.services))
    targets = ",".join(fleet.addresses)
    async with gateway_over(tmp_path, "127.0.0.1:1", targets, "redis://127.0.0.1:1", **settings) as channel:
        await until_serving(channel)
        yield Gateway(channel)


async def test_a_killed_replica_ends_its_streams_and_no_others(fleet: Fleet, tmp_path: Path) -> None:
    async with gateway_of(fleet, tmp_path) as gateway:
        # More than the replica that reads "endless" first may have for itself.
        streams = [await gateway.endless() for _ in range(9)]
        victim = streams[0][0]
        assert len({pid for pid, _ in streams}) > 1
        os.kill(victim, signal.SIGKILL)
        for pid, stream in streams:
            if pid == victim:
                assert (await error_of(stream.rest())).reason == "LLM_UNAVAILABLE"
        for pid, stream in streams:
            if pid != victim:
                assert (await stream.next()).delta.text
                stream.cancel()
        assert victim not in {int(await gateway.ask(f"question {number}")) for number in range(10)}


async def test_a_turn_without_a_word_yet_is_answered_by_another_replica(fleet: Fleet, tmp_path: Path) -> None:
    async with gateway_of(fleet, tmp_path) as gateway:
        stream = gateway.stream("first is silent")
        first = (await stream.next()).started.model
        await until(lambda: (tmp_path / "read").exists())
        os.kill(int(first), signal.SIGKILL)
        assert await stream.rest() not in ("", first)


async def test_a_frozen_replica_is_left_and_found_again(fleet: Fleet, tmp_path: Path) -> None:
    async with gateway_of(fleet, tmp_path, replica_stall_s=0.5) as gateway:
        frozen, stream = await gateway.endless()
        os.kill(frozen, signal.SIGSTOP)
        # Some of these go to the frozen one, and wait there until that is known.
        turns = [asyncio.create_task(gateway.ask(f"question {number}")) for number in range(10)]
        assert (await error_of(stream.rest())).reason == "LLM_UNAVAILABLE"
        assert frozen not in {int(await turn) for turn in turns}
        os.kill(frozen, signal.SIGCONT)
        async with asyncio.timeout(100):
            while frozen not in [int(await gateway.ask(f"question {number}")) for number in range(10)]:
                await asyncio.sleep(0.1)


async def test_a_replica_that_comes_back_elsewhere_in_time_gets_its_share(fleet: Fleet, tmp_path: Path) -> None:
    async with gateway_of(fleet, tmp_path) as gateway:
        fleet.services[0].process.kill()
        before = {await gateway.ask(f"question {number}") for number in range(20)}
        assert len(before) == 2
        fleet.restart(0)
        async with asyncio.timeout(100):
            while len({await gateway.ask(f"question {number}") for number in range(20)} - before) == 0:
                await asyncio.sleep(0.1)


async def test_a_rolling_restart_fails_no_turn(fleet: Fleet, tmp_path: Path) -> None:
    async with gateway_of(fleet, tmp_path) as gateway:
        going = asyncio.Event()
        going.set()
        answers: list[str] = []

        async def ask_on(name: str) -> None:
            number = 0
            while going.is_set():
                number += 1
                answers.append(await gateway.ask(f"{name} {number}"))

        async with asyncio.TaskGroup() as group:
            askers = [group.create_task(ask_on(f"asker {number}")) for number in range(4)]
            for number in range(3):
                fleet.terminate(number)
                await until(lambda number=number: fleet.services[number].process.exit_code is not None)
                fleet.restart(number)
                await until(lambda number=number: fleet.services[number].is_ready())
                known = len(answers)
                await until(lambda known=known: len(answers) > known + 20 or any(asker.done() for asker in askers))
            going.clear()
        assert all(answers)
        assert len(set(answers)) >= 3
