"""Thousands of streams opened at once: `python -m benchmarks.many_streams --model DIR`.

Each is answered or refused with a time to come back; whatever else happens to one is a fault. Shows how many ended how,
the gateway's memory before, at its most and after, and how late its event loop came to what was due. With --retry those
who were refused come back when they were told to, until all are answered.
"""

import argparse
import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from urllib.request import urlopen

import grpc

from benchmarks.command import exit_with, machine_facts, progress
from benchmarks.machine import CpuMeter, Memory, memory_of
from benchmarks.peers.peer import PeerError
from deploy.local.stack import LocalStack, StackError, StackOptions
from internvl_serving.common.v1 import generation_pb2
from internvl_serving.gateway.v1 import chat_service_pb2, chat_service_pb2_grpc, content_pb2
from shared.errors import LlmUnavailable
from shared.rpc.status import from_rpc_error

ANSWERED: Final = "answered"
_LAG: Final = re.compile(r'internvl_event_loop_lag_seconds_bucket\{le="([^"]+)"\} ([0-9.e+]+)')
_OWN_CONNECTION: Final = [("grpc.use_local_subchannel_pool", 1)]  # of each channel; others share one
_SETTLE_S: Final = 3.0  # what is given back goes back to the system meanwhile


@dataclass(frozen=True, slots=True)
class Ended:
    """How a stream ended: `ANSWERED`, or a reason; after how long, how often it asked, and when it was to come back."""

    how: str
    seconds: float
    attempts: int = 1
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Burst:
    """What a burst of streams came to."""

    ended: list[Ended]
    wall_s: float
    memory: dict[str, float]
    loop_lag_p99_s: float
    others_cores: float


class Asker:
    """Asks one question on a few channels in turn."""

    def __init__(self, stubs: Sequence[Any], output_tokens: int, deadline_s: float, *, retries: bool) -> None:
        part = content_pb2.Part(text="Say something.")
        config = generation_pb2.GenerationConfig(max_output_tokens=output_tokens, temperature=0.0, ignore_end=True)
        message = content_pb2.Message(role=generation_pb2.ROLE_USER, parts=[part])
        self._request = chat_service_pb2.ChatRequest(messages=[message], generation_config=config, system_message="")
        self._stubs = stubs
        self._deadline_s = deadline_s
        self._retries = retries

    async def ask(self, number: int) -> Ended:
        """Ask until there is an answer, where refusals are to be waited out; else once."""
        started, attempts = time.perf_counter(), 0
        while True:
            attempts += 1
            how, retry_after_s = await self._ask_once(self._stubs[number % len(self._stubs)])
            if how == ANSWERED or retry_after_s is None or not self._retries:
                return Ended(how, time.perf_counter() - started, attempts, retry_after_s)
            await asyncio.sleep(retry_after_s)

    async def _ask_once(self, stub: Any) -> tuple[str, float | None]:
        is_finished = False
        try:
            async for response in stub.Chat(self._request, timeout=self._deadline_s):
                is_finished = response.HasField("finished")
        except grpc.aio.AioRpcError as error:
            known = from_rpc_error(error, LlmUnavailable)
            return f"{error.code().name} {known.reason}", known.retry_after_s
        return (ANSWERED if is_finished else "ended in silence"), None


def lag_counts(address: str) -> dict[float, float]:
    """Return how often the gateway's loop was late by no more than so many seconds."""
    with urlopen(f"http://{address}/metrics", timeout=30) as response:
        text = response.read().decode()
    return {float(bound): float(count) for bound, count in _LAG.findall(text)}


def p99_of(before: dict[float, float], after: dict[float, float]) -> float:
    """Return the least bound that 99 of 100 measurements between two readings are within."""
    grown = {bound: count - before.get(bound, 0.0) for bound, count in sorted(after.items())}
    most = max(grown.values(), default=0.0)
    return next((bound for bound, count in grown.items() if count >= 0.99 * most), float("inf"))


async def burst(stack: LocalStack, metrics: str, arguments: argparse.Namespace) -> Burst:
    """Open all streams and wait for their ends."""
    gateway = [stack.processes["gateway"].pid]
    async with AsyncExitStack() as channels:
        opened = [
            await channels.enter_async_context(grpc.aio.insecure_channel(stack.address, options=_OWN_CONNECTION))
            for _ in range(arguments.channels)
        ]
        stubs = [chat_service_pb2_grpc.ChatServiceStub(channel) for channel in opened]
        asker = Asker(stubs, arguments.output_tokens, arguments.deadline_s, retries=arguments.retry)
        await asyncio.gather(*(Asker([stub], 2, 600.0, retries=True).ask(0) for stub in stubs))
        before, lag_before, meter = memory_of(gateway), lag_counts(metrics), CpuMeter(gateway)
        progress(f"opening {arguments.streams} streams")
        started = time.perf_counter()
        ended = await asyncio.gather(*(asker.ask(number) for number in range(arguments.streams)))
        wall_s = time.perf_counter() - started
        others, lag_after = meter.read().others, lag_counts(metrics)
    await asyncio.sleep(_SETTLE_S)
    memory = _memory_cells(before, memory_of(gateway))
    return Burst(ended, wall_s, memory, p99_of(lag_before, lag_after), others)


def _memory_cells(before: Memory, after: Memory) -> dict[str, float]:
    return {"before": before.pss, "most": after.peak, "after": after.pss}


def report(found: Burst) -> None:
    """Print the tables."""
    print(f"\n{'ended':<40}{'streams':>9}{'median s':>10}{'most s':>9}{'attempts':>10}{'come back in s':>18}")
    for how, count in Counter(each.how for each in found.ended).most_common():
        same = [each for each in found.ended if each.how == how]
        times = sorted(each.seconds for each in same)
        hints = [each.retry_after_s for each in same if each.retry_after_s is not None]
        back = f"{min(hints):.2f} to {max(hints):.2f}" if hints else "-"
        attempts = sum(each.attempts for each in same) / count
        print(f"{how:<40}{count:>9}{times[count // 2]:>10.2f}{times[-1]:>9.2f}{attempts:>10.2f}{back:>18}")
    memory = ", ".join(f"{name} {mib:.0f}" for name, mib in found.memory.items())
    print(f"\n{found.wall_s:.1f} s in all. Gateway's memory in MiB: {memory}. Its event loop was late by at most")
    print(f"{found.loop_lag_p99_s * 1e3:.0f} ms in 99 of 100 cases. Others had {found.others_cores:.2f} cores.")


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line asks; raise `PeerError`."""
    options = StackOptions(arguments.model.resolve(), dtype=arguments.dtype, http_listen="", metrics=True)
    try:
        with LocalStack(options) as stack:
            found = asyncio.run(burst(stack, stack.metrics["gateway"], arguments))
    except StackError as error:
        raise PeerError(error.message) from None
    report(found)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine_facts(), "burst": asdict(found)}, indent=1) + "\n")


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.many_streams",
        description=__doc__,
        epilog="Limits of the gateway come from the environment, such as GATEWAY_MAX_RUNNING_TURNS=256.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory; a tiny one will do")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--streams", type=int, default=3000, help="default: %(default)s")
    parser.add_argument("--channels", type=int, default=10, help="connections to the gateway (default: %(default)s)")
    parser.add_argument("--output-tokens", type=int, default=8, help="of every answer (default: %(default)s)")
    parser.add_argument("--deadline-s", type=float, default=300.0, help="of every call (default: %(default)s)")
    parser.add_argument("--retry", action="store_true", help="whoever is refused comes back when told to")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    arguments = parser.parse_args()
    exit_with(lambda: run(arguments))


if __name__ == "__main__":
    main()
