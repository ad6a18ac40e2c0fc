"""The LLM service over real channels: streams, errors, cancellation, and embeddings from a vision replica."""

import asyncio
import shutil
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from internvl_serving.common.v1 import embedding_pb2, generation_pb2
from internvl_serving.llm.v1 import llm_service_pb2 as pb
from internvl_serving.llm.v1 import llm_service_pb2_grpc
from shared.errors import (
    EmbeddingIncompatible,
    EmbeddingNotFound,
    EmptyMessage,
    InvalidGenerationConfig,
    InvalidRequest,
    PromptTooLong,
    ServiceError,
)
from shared.rpc.channel import open_channel
from tests.golden_cases import CHECKPOINTS, UNSAFE_CASES, turns
from tests.rpc.llm_calls import (
    CHECKPOINT,
    HIDDEN,
    TOKENS_PER_TILE,
    error_of,
    handle,
    picture_prompt,
    prompt,
    request,
    running,
    text_of,
    vision,
)

TEXT_CASES = [
    case for case in turns(CHECKPOINTS[0]) if not case.groups and case.name not in UNSAFE_CASES and case.config
]


async def test_golden_text_cases_over_the_wire_all_at_once(tmp_path: Path) -> None:
    async with running(tmp_path) as stub:

        async def ask(case: Any) -> tuple[list[int], str, list[int]]:
            asked = prompt(*(text for _, text in case.tagged_texts), system_message=case.system_message)
            penalty = case.config.get("repetition_penalty")
            generation = request(asked, max_output_tokens=case.config["max_new_tokens"], repetition_penalty=penalty)
            events = [event async for event in stub.Generate(generation)]
            kinds = [event.WhichOneof("event") for event in events]
            assert kinds == ["started", *["delta"] * (len(kinds) - 2), "finished"]
            deltas = [event.delta for event in events]
            finished = events[-1].finished
            assert finished.usage.prompt_token_count == len(case.input_ids)
            assert finished.usage.output_token_count == len(case.output_ids)
            return (
                [token for delta in deltas for token in delta.token_ids],
                "".join(delta.text for delta in deltas),
                list(events[0].started.prompt_token_ids),
            )

        answers = await asyncio.gather(*map(ask, TEXT_CASES))
        expected = [(case.output_ids, case.response, case.input_ids) for case in TEXT_CASES]
        assert answers == expected
        assert len(expected) >= 6


async def test_an_embedding_comes_from_the_replica_that_the_handle_names(tmp_path: Path) -> None:
    async with running(tmp_path) as stub, vision() as (servicer, address):
        servicer.held.add("ab" * 32)
        for system_message, tier in (
            ("Be brief.", embedding_pb2.CACHE_TIER_VISION),
            ("Be brief.", embedding_pb2.CACHE_TIER_PREFIX),
            ("Take your time.", embedding_pb2.CACHE_TIER_LOCAL),
        ):
            asked = request(picture_prompt(handle(address)))
            asked.prompt.system_message = system_message
            events = [event async for event in stub.Generate(asked)]
            (transfer,) = events[-1].finished.transfers
            assert (transfer.digest, transfer.cache_tier) == ("ab" * 32, tier)
            assert events[-1].finished.usage.visual_token_count == TOKENS_PER_TILE


async def test_an_embedding_of_another_shape_than_its_handle_says_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as stub, vision() as (servicer, address):
        servicer.held.add("ab" * 32)
        servicer.hidden_size = HIDDEN // 2
        error = await error_of(stub.Generate(request(picture_prompt(handle(address)))))
        assert isinstance(error, EmbeddingIncompatible)


@pytest.mark.parametrize("num_rows", [0, TOKENS_PER_TILE - 1, TOKENS_PER_TILE + 1, 10**9])
async def test_an_embedding_with_too_few_or_endless_bytes_is_not_found(tmp_path: Path, num_rows: int) -> None:
    async with running(tmp_path) as stub, vision() as (servicer, address):
        servicer.held.add("ab" * 32)
        servicer.num_rows = num_rows
        error = await error_of(stub.Generate(request(picture_prompt(handle(address)))))
        assert isinstance(error, EmbeddingNotFound)


async def test_an_embedding_that_nobody_has_is_not_found_by_its_digest(tmp_path: Path) -> None:
    async with running(tmp_path) as stub, vision() as (_, address):
        for source in (address, "127.0.0.1:1"):
            error = await error_of(stub.Generate(request(picture_prompt(handle(source)))))
            assert isinstance(error, EmbeddingNotFound)
            assert error.resource == "ab" * 32


@pytest.mark.parametrize("changes", [{"hidden_size": 128}, {"token_count": 5}, {"tile_count": 2}])
async def test_a_handle_of_another_model_is_refused_before_anything_is_fetched(
    tmp_path: Path, changes: dict[str, int]
) -> None:
    async with running(tmp_path) as stub:
        error = await error_of(stub.Generate(request(picture_prompt(handle("127.0.0.1:1", **changes)))))
        assert isinstance(error, EmbeddingIncompatible)


async def test_bad_requests_are_documented_errors_and_change_nothing(tmp_path: Path) -> None:
    bad: list[tuple[pb.GenerateRequest, type[ServiceError]]] = [
        (request(pb.Prompt()), InvalidRequest),
        (request(prompt("")), EmptyMessage),
        (request(prompt("a", "b")), InvalidRequest),
        (request(prompt("Hi"), temperature=-1.0), InvalidGenerationConfig),
        (request(prompt("Hi"), temperature=float("nan")), InvalidGenerationConfig),
        (request(prompt("Hi"), stop_sequences=["x"] * 10_000), InvalidGenerationConfig),
        (request(prompt("word " * 400)), PromptTooLong),
    ]
    async with running(tmp_path, max_context_tokens=256) as stub:
        before = await text_of(stub.Generate(request(prompt("Hi"))))
        for asked, kind in bad:
            assert type(await error_of(stub.Generate(asked))) is kind
        assert await text_of(stub.Generate(request(prompt("Hi")))) == before


async def test_a_cancelled_call_makes_room_for_the_next(tmp_path: Path) -> None:
    # The cache holds one long answer only: the next can run only when the cancelled one's blocks are back.
    async with running(tmp_path, max_context_tokens=4000, max_open_requests=1) as stub:
        call = stub.Generate(request(prompt("Hi"), max_output_tokens=3900, ignore_end=True))
        stream = aiter(call)
        for _ in range(3):
            await anext(stream)
        call.cancel()
        await asyncio.sleep(0.5)
        events = [event async for event in stub.Generate(request(prompt("Hi")))]
        assert events[-1].finished.usage.output_token_count == 8


async def test_stop_sequences_end_the_answer_and_are_not_part_of_it(tmp_path: Path) -> None:
    async with running(tmp_path) as stub:

        async def text_of(**config: Any) -> tuple[str, int]:
            asked = request(prompt("Hello, who are you?"), max_output_tokens=16, **config)
            events = [event async for event in stub.Generate(asked)]
            return "".join(event.delta.text for event in events), events[-1].finished.finish_reason

        whole, _ = await text_of()
        stop = whole[4:6]
        cut, reason = await text_of(stop_sequences=[stop])
        assert cut == whole[: whole.index(stop)].strip()
        assert reason == generation_pb2.FINISH_REASON_STOP


async def test_a_seed_repeats_a_sampled_answer_whatever_else_runs(tmp_path: Path) -> None:
    async with running(tmp_path) as stub:

        async def ids(seed: int) -> list[int]:
            asked = request(prompt("Hi"), temperature=1.5, seed=seed, max_output_tokens=12)
            return [token async for event in stub.Generate(asked) for token in event.delta.token_ids]

        alone = await ids(7)
        together = await asyncio.gather(*(ids(seed) for seed in (7, 8, 9, 7)))
        assert together[0] == together[3] == alone
        assert len({tuple(answer) for answer in together}) > 1


@pytest.mark.parametrize("damage", ["missing tensor", "truncated shard", "no config", "no tokenizer"])
async def test_a_damaged_checkpoint_stops_the_service_with_one_clear_line(tmp_path: Path, damage: str) -> None:
    directory = tmp_path / "model"
    shutil.copytree(CHECKPOINT, directory)
    expected = DAMAGES[damage](directory)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "llm_service", "--model", str(directory), "--log-format", "json",
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, stderr = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    last = stderr.decode().splitlines()[-1]
    assert last.startswith("llm: ")
    assert expected in last
    assert "Traceback" not in stderr.decode()


FAULT = """
import llm_service.engine.scheduler as scheduler

steps = 0
next_batch = scheduler.Scheduler.next_batch


def fail_after_a_while(self):
    global steps
    steps += 1
    assert steps < 10, "a fault of ours"
    return next_batch(self)


scheduler.Scheduler.next_batch = fail_after_a_while
import runpy

runpy.run_module("llm_service", run_name="__main__")
"""


async def test_a_service_whose_engine_has_stopped_ends_so_that_another_takes_its_place(tmp_path: Path) -> None:
    address_file = tmp_path / "llm"
    flags = ["--model", str(CHECKPOINT), "--kv-cache-bytes", str(16 << 20), "--address-file", str(address_file)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", FAULT, *flags, "--log-format", "json", stderr=asyncio.subprocess.PIPE
    )
    while not address_file.exists():
        await asyncio.sleep(0.05)
    async with open_channel(address_file.read_text(), 8 << 20) as channel:
        stub = llm_service_pb2_grpc.LlmServiceStub(channel)
        await stub.CountTokens(pb.CountTokensRequest(prompt=prompt("Hi")), wait_for_ready=True)
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in stub.Generate(request(prompt("Hi"), max_output_tokens=100, ignore_end=True)):
                pass
    _, stderr = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 1
    assert "a part that it cannot work without has stopped" in stderr.decode().splitlines()[-1]


def _without_tensor(directory: Path) -> str:
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    del tensors[name]
    save_file(tensors, file)
    return name


def _truncated(directory: Path) -> str:
    file = directory / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) - 100])
    return "is cut short: tensor"


def _removed(name: str) -> Any:
    def remove(directory: Path) -> str:
        (directory / name).unlink()
        return name

    return remove


DAMAGES = {
    "missing tensor": _without_tensor,
    "truncated shard": _truncated,
    "no config": _removed("config.json"),
    "no tokenizer": _removed("tokenizer_config.json"),
}
