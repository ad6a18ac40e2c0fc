"""What the gateway adds to the first token: `python -m benchmarks.gateway_overhead --model DIR`.

The same question about the same picture, whose embedding a cache holds, is asked of the gateway and of the LLM service
itself, in turns: the difference is everything the gateway does, the call to the vision service for the handle included.
Both know the prompt already. First one at a time, then `--concurrency` at a time.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.command import exit_with, machine_facts, progress
from benchmarks.machine import CpuMeter
from benchmarks.peers.peer import PeerError
from deploy.local.stack import LocalStack, StackError, StackOptions
from gateway import stage_messages
from gateway.content import MediaPart, Medium, Message, Role, TextPart
from gateway.dialogue import Dialogue
from gateway.events import GenerateRequest, GenerationConfig
from gateway.prompt import prompt_of
from internvl_client.bench.pictures import draw_picture
from internvl_serving.common.v1 import generation_pb2
from internvl_serving.gateway.v1 import (
    chat_service_pb2,
    chat_service_pb2_grpc,
    content_pb2,
    media_service_pb2,
    media_service_pb2_grpc,
)
from internvl_serving.llm.v1 import llm_service_pb2_grpc
from internvl_serving.vision.v1 import vision_service_pb2, vision_service_pb2_grpc
from shared.digest import digest_of
from shared.rpc.channel import open_channel

_MESSAGE_BYTES: Final = 8 << 20
_TEXT: Final = "What is in this picture?"
_TARGET_MS: Final = 15.0
_TARGET_SPREAD: Final = 3.0
_OUTPUT_TOKENS: Final = 4
FirstToken = Callable[[], Awaitable[float]]


@dataclass(frozen=True, slots=True)
class Overhead:
    """Milliseconds to the first token, by who was asked, and the cores that others had meanwhile."""

    concurrency: int
    gateway_ms: list[float]
    llm_ms: list[float]
    others_cores: float

    @property
    def median_ms(self) -> float:
        """What it added in the middle."""
        return statistics.median(self.gateway_ms) - statistics.median(self.llm_ms)

    @property
    def p99_ms(self) -> float:
        """What it added to all but one in a hundred, over what the LLM service needed for all but one in a hundred."""
        return _p99(self.gateway_ms) - _p99(self.llm_ms)


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, round(0.99 * len(values)))]


async def first_token_s(call: Any, is_delta: Callable[[Any], bool]) -> float:
    """Return the seconds from now to the first delta of a call that is made now, and read it to its end."""
    started, first_s = time.perf_counter(), 0.0
    async for response in call:
        if not first_s and is_delta(response):
            first_s = time.perf_counter() - started
    return first_s


def gateway_question(stub: Any, digest: str) -> FirstToken:
    """Return what asks the gateway."""
    parts = [content_pb2.Part(media=content_pb2.Media(digest=digest)), content_pb2.Part(text=_TEXT)]
    message = content_pb2.Message(role=generation_pb2.ROLE_USER, parts=parts)
    config = generation_pb2.GenerationConfig(max_output_tokens=_OUTPUT_TOKENS, temperature=0.0, ignore_end=True)
    request = chat_service_pb2.ChatRequest(messages=[message], generation_config=config, system_message="")
    return lambda: first_token_s(stub.Chat(request), lambda response: response.HasField("delta"))


async def llm_question(vision: Any, stub: Any, digest: str) -> FirstToken:
    """Return what asks the LLM service, with the handle that the vision service gives for the picture."""
    medium = Medium(digest)
    header = vision_service_pb2.EncodeRequest(header=stage_messages.encode_header(medium, prefetch=False))
    handle = stage_messages.encoded(await vision.Encode(iter([header]))).handle
    dialogue = Dialogue("", (), (Message(Role.USER, (MediaPart((medium,)), TextPart(_TEXT))),))
    config = GenerationConfig(max_output_tokens=_OUTPUT_TOKENS, temperature=0.0, ignore_end=True)
    request = stage_messages.generate_request(GenerateRequest(prompt_of(dialogue, {medium: handle}), config))
    return lambda: first_token_s(stub.Generate(request), lambda response: response.HasField("delta"))


async def measure(gateway: FirstToken, llm: FirstToken, concurrency: int, count: int, pids: Sequence[int]) -> Overhead:
    """Ask both in turns, `count` times each."""
    meter = CpuMeter(pids)
    found: dict[FirstToken, list[float]] = {gateway: [], llm: []}
    for number in range(count // concurrency):
        for ask in (gateway, llm) if number % 2 else (llm, gateway):
            found[ask] += [1e3 * each for each in await asyncio.gather(*(ask() for _ in range(concurrency)))]
    return Overhead(concurrency, found[gateway], found[llm], meter.read().others)


async def upload(stub: Any, content: bytes) -> str:
    """Have the gateway hold a picture; return its digest."""
    digest = digest_of(content)
    header = media_service_pb2.UploadRequest(header=media_service_pb2.UploadHeader(digest=digest))
    await stub.Upload(iter([header, media_service_pb2.UploadRequest(chunk=content)]))
    return digest


async def measure_all(stack: LocalStack, arguments: argparse.Namespace) -> list[Overhead]:
    """Measure one at a time, and many."""
    async with AsyncExitStack() as channels:
        addresses = [str(stack.service(name).address) for name in ("gateway", "vision", "llm")]
        gateway, vision, llm = [
            await channels.enter_async_context(open_channel(address, _MESSAGE_BYTES)) for address in addresses
        ]
        digest = await upload(media_service_pb2_grpc.MediaServiceStub(gateway), draw_picture(448, 448, "overhead"))
        by_gateway = gateway_question(chat_service_pb2_grpc.ChatServiceStub(gateway), digest)
        await by_gateway()  # encodes the picture
        vision_stub = vision_service_pb2_grpc.VisionServiceStub(vision)
        by_llm = await llm_question(vision_stub, llm_service_pb2_grpc.LlmServiceStub(llm), digest)
        pids = [process.pid for process in stack.processes.values()]
        found = []
        for concurrency in (1, arguments.concurrency):
            progress(f"{concurrency} at a time")
            await measure(by_gateway, by_llm, concurrency, arguments.warm_up, pids)
            found.append(await measure(by_gateway, by_llm, concurrency, arguments.count, pids))
        return found


def report(found: Sequence[Overhead]) -> None:
    """Print the table."""
    names = ("at a time", "gateway ms", "p99", "llm ms", "p99", "added ms", "p99", "others")
    print("\n" + "".join(f"{name:>11}" for name in names))
    for each in found:
        cells = [statistics.median(each.gateway_ms), _p99(each.gateway_ms), statistics.median(each.llm_ms)]
        cells += [_p99(each.llm_ms), each.median_ms, each.p99_ms]
        print(f"{each.concurrency:>11}" + "".join(f"{cell:>11.1f}" for cell in cells) + f"{each.others_cores:>11.2f}")
    print(f"\nTo the first token. The aim: {_TARGET_MS:.0f} ms added in the median, and with many at a time a 99th")
    print(f"percentile of no more than {_TARGET_SPREAD:.0f} times the median. The client shares the machine.")


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line asks; raise `PeerError`."""
    try:
        with LocalStack(StackOptions(arguments.model.resolve(), dtype=arguments.dtype)) as stack:
            found = asyncio.run(measure_all(stack, arguments))
    except StackError as error:
        raise PeerError(error.message) from None
    report(found)
    if arguments.json:
        figures = [asdict(each) | {"median_ms": each.median_ms, "p99_ms": each.p99_ms} for each in found]
        arguments.json.write_text(json.dumps({"machine": machine_facts(), "overhead": figures}, indent=1) + "\n")


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway_overhead", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory; a tiny one shows the most")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--count", type=int, default=320, help="questions to each (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=48, help="questions before (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    arguments = parser.parse_args()
    exit_with(lambda: run(arguments))


if __name__ == "__main__":
    main()
