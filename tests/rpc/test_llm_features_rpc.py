"""What a request can ask for beside plain text, over real channels: candidates, log-probabilities, schemas, scores."""

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import pytest

from internvl_serving.common.v1 import embedding_pb2, generation_pb2
from internvl_serving.llm.v1 import llm_service_pb2 as pb
from shared import critic
from shared.errors import (
    InvalidGenerationConfig,
    InvalidJsonSchema,
    InvalidRequest,
    LlmUnavailable,
    NotSupportedByModel,
    ServiceError,
)
from shared.rpc.status import from_rpc_error
from shared.tensors import bytes_of
from tests.golden_cases import CHECKPOINTS, GOLDEN, GoldenImage
from tests.golden_models import GoldenModel
from tests.rpc.llm_calls import HIDDEN, TOKENS_PER_TILE, error_of, handle, prompt, request, running, vision

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 999}},
        "required": ["a"],
        "additionalProperties": False,
    }
)
LOOK = generation_pb2.Tool(name="look", description="Looks.", parameters_json_schema='{"type": "object"}')


async def events_of(stub: Any, asked: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    return [event async for event in stub.Generate(asked)]


def ids_of(events: list[pb.GenerateResponse], candidate: int = 0) -> list[int]:
    deltas = [event.delta for event in events if event.WhichOneof("event") == "delta"]
    return [token for delta in deltas if delta.candidate_index == candidate for token in delta.token_ids]


def text_of(events: list[pb.GenerateResponse], candidate: int = 0) -> str:
    return "".join(event.delta.text for event in events if event.delta.candidate_index == candidate)


async def test_candidates_come_with_their_numbers_and_results(tmp_path: Path) -> None:
    async with running(tmp_path) as stub:
        sampled = {"temperature": 1.2, "seed": 9, "max_output_tokens": 10}
        alone = await events_of(stub, request(prompt("Hi"), **sampled))
        several = await events_of(stub, request(prompt("Hi"), candidate_count=3, **sampled))
    finished = several[-1].finished
    assert ids_of(several) == ids_of(alone)
    assert [result.output_token_count for result in finished.candidates] == [
        len(ids_of(several, index)) for index in range(3)
    ]
    assert finished.usage.output_token_count == sum(result.output_token_count for result in finished.candidates)
    best = max(finished.candidates, key=lambda result: result.mean_logprob)
    assert finished.finish_reason == best.finish_reason
    assert all(result.mean_logprob < 0 for result in finished.candidates)
    assert len(alone[-1].finished.candidates) == 1
    assert not any(event.delta.logprobs for event in several)


async def test_log_probabilities_come_one_per_id(tmp_path: Path) -> None:
    async with running(tmp_path) as stub:
        events = await events_of(stub, request(prompt("Hi"), top_logprobs=4))
    entries = [entry for event in events for entry in event.delta.logprobs]
    assert [entry.token_id for entry in entries] == ids_of(events)
    for entry in entries:
        assert entry.top[0].token_id == entry.token_id, "greedy takes the likeliest"
        assert entry.top[0].logprob == entry.logprob
        assert [top.logprob for top in entry.top] == sorted((top.logprob for top in entry.top), reverse=True)
        assert len(entry.top) == 4
    mean = sum(entry.logprob for entry in entries) / len(entries)
    assert events[-1].finished.candidates[0].mean_logprob == pytest.approx(mean, rel=1e-5)


async def test_constrained_answers_meet_their_schema_at_every_temperature(tmp_path: Path) -> None:
    async with running(tmp_path) as stub:
        free = await events_of(stub, request(prompt("Hi")))

        async def ask(temperature: float) -> list[pb.GenerateResponse]:
            asked = request(
                prompt("Hi"), json_schema=SCHEMA, temperature=temperature, candidate_count=2, max_output_tokens=300
            )
            return await events_of(stub, asked)

        *answers, beside = await asyncio.gather(*map(ask, (0.0, 1.0, 100.0)), events_of(stub, request(prompt("Hi"))))
    assert ids_of(beside) == ids_of(free)
    for events in answers:
        for candidate, result in enumerate(events[-1].finished.candidates):
            assert result.finish_reason == generation_pb2.FINISH_REASON_STOP
            value = json.loads(text_of(events, candidate))
            assert list(value) == ["a"]
            assert 0 <= value["a"] <= 999


async def test_what_cannot_be_done_is_a_documented_error_and_changes_nothing(tmp_path: Path) -> None:
    tools = pb.Prompt(turns=prompt("Hi").turns, tools=[LOOK, LOOK])
    called = generation_pb2.ToolCall(name="look", arguments_json="[1]")
    asking = pb.Turn(role=generation_pb2.ROLE_ASSISTANT, segments=[pb.Segment(tool_call=called)])
    result = pb.Turn(role=generation_pb2.ROLE_TOOL, segments=[pb.Segment(text="done")])
    bad: list[tuple[pb.GenerateRequest, type[ServiceError]]] = [
        (request(prompt("Hi"), candidate_count=17), InvalidGenerationConfig),
        (request(prompt("Hi"), candidate_count=2, num_beams=2), InvalidGenerationConfig),
        (request(prompt("Hi"), json_schema="{}", num_beams=2), InvalidGenerationConfig),
        (request(prompt("Hi"), json_schema="{}", ignore_end=True), InvalidGenerationConfig),
        (request(prompt("Hi"), top_logprobs=21), InvalidGenerationConfig),
        (request(prompt("Hi"), visual_position_stride=100), InvalidGenerationConfig),
        (request(prompt("Hi"), json_schema="{"), InvalidJsonSchema),
        (request(prompt("Hi"), json_schema='{"enum": []}'), InvalidJsonSchema),
        (request(tools), InvalidRequest),
        (request(pb.Prompt(turns=[*prompt("Hi").turns, asking, result])), InvalidRequest),
        (request(pb.Prompt(turns=[*prompt("Hi").turns, result])), InvalidRequest),
    ]
    async with running(tmp_path) as stub:
        before = await events_of(stub, request(prompt("Hi")))
        for asked, kind in bad:
            assert type(await error_of(stub.Generate(asked))) is kind, asked
        assert ids_of(await events_of(stub, request(prompt("Hi")))) == ids_of(before)


async def test_tools_are_read_by_models_that_know_them_only(tmp_path: Path) -> None:
    called = generation_pb2.ToolCall(name="look", arguments_json='{"where": "left"}')
    said = [
        *prompt("Hi").turns,
        pb.Turn(role=generation_pb2.ROLE_ASSISTANT, segments=[pb.Segment(text="Let me"), pb.Segment(tool_call=called)]),
        pb.Turn(role=generation_pb2.ROLE_TOOL, segments=[pb.Segment(text="a cat")]),
    ]
    asked = pb.Prompt(turns=said, tools=[LOOK])
    async with running(tmp_path) as stub:
        with_tools = await stub.CountTokens(pb.CountTokensRequest(prompt=asked))
        without = await stub.CountTokens(pb.CountTokensRequest(prompt=prompt("Hi")))
        assert with_tools.token_count > without.token_count + 100
        assert (await events_of(stub, request(asked)))[-1].WhichOneof("event") == "finished"
    other = tmp_path / "other"
    other.mkdir()
    async with running(other, checkpoint=GOLDEN / "checkpoints" / "internvl2-1b-tiny") as stub:
        assert type(await error_of(stub.Generate(request(asked)))) is NotSupportedByModel


async def test_tags_are_counted_as_they_would_be_read(tmp_path: Path) -> None:
    asked = prompt("find <ref>cat</ref>")
    async with running(tmp_path) as stub:
        for grounding in (False, True):
            counted = await stub.CountTokens(pb.CountTokensRequest(prompt=asked, grounding=grounding))
            events = await events_of(stub, request(asked, grounding=grounding))
            assert counted.token_count == events[-1].finished.usage.prompt_token_count
        tagged = await stub.CountTokens(pb.CountTokensRequest(prompt=asked, grounding=True))
        plain = await stub.CountTokens(pb.CountTokensRequest(prompt=asked))
    assert tagged.token_count < plain.token_count


async def test_frames_of_a_video_are_slices_of_one_embedding_fetched_once(tmp_path: Path) -> None:
    async with running(tmp_path) as stub, vision() as (servicer, address):
        servicer.held.add("cd" * 32)
        servicer.tile_count, servicer.num_rows = 3, 3 * TOKENS_PER_TILE
        clip = handle(address, "cd" * 32, tile_count=3, token_count=3 * TOKENS_PER_TILE, frame_count=3)
        frames = [pb.Segment(visual=pb.VisualSegment(embeddings=[clip], frame=frame)) for frame in range(3)]
        turn = pb.Turn(role=generation_pb2.ROLE_USER, segments=[*frames, pb.Segment(text="\nWhat?")])
        events = await events_of(stub, request(pb.Prompt(turns=[turn])))
        assert events[-1].finished.usage.visual_token_count == 3 * TOKENS_PER_TILE
        assert [transfer.digest for transfer in events[-1].finished.transfers] == ["cd" * 32]
        assert servicer.asked == ["cd" * 32]
        outside = pb.Segment(visual=pb.VisualSegment(embeddings=[clip], frame=3))
        error = await error_of(stub.Generate(request(pb.Prompt(turns=[pb.Turn(role=1, segments=[outside])]))))
        assert type(error) is InvalidRequest


async def test_a_critics_scores_are_the_references(tmp_path: Path) -> None:
    golden = json.loads((GOLDEN / "expected" / CHECKPOINTS[0] / "prm.json").read_text())
    picture = golden["image"]
    content = (GOLDEN / "images" / picture["file"]).read_bytes()
    rows = GoldenModel(CHECKPOINTS[0]).embedding(
        GoldenImage(picture["file"], content, picture["max_num"], picture["n_tiles"])
    )
    assert rows.shape == (TOKENS_PER_TILE, HIDDEN)
    async with running(tmp_path) as stub, vision() as (servicer, address):
        servicer.held.add("ab" * 32)
        servicer.content["ab" * 32] = bytes(bytes_of(rows))
        asked = [critic_prompt(golden, entry, handle(address)) for entry in golden["candidates"]]
        scores = await asyncio.gather(
            *(stub.ScoreTurns(pb.ScoreTurnsRequest(prompt=each, choices=critic.CHOICES)) for each in asked)
        )
    for entry, response in zip(golden["candidates"], scores, strict=True):
        assert response.model
        likely = [turn.probabilities[0] for turn in response.turns]
        assert likely == pytest.approx(entry["step_scores"], abs=1e-4)
        assert critic.answer_score(likely) == pytest.approx(entry["mean_score"], abs=1e-4)


def critic_prompt(golden: dict[str, Any], entry: dict[str, Any], seen: embedding_pb2.EmbeddingHandle) -> pb.Prompt:
    picture = pb.Segment(visual=pb.VisualSegment(embeddings=[seen]))
    turns = [
        pb.Turn(
            role=generation_pb2.ROLE_ASSISTANT if turn.is_critic else generation_pb2.ROLE_USER,
            segments=[pb.Segment(text=part) if isinstance(part, str) else part for part in turn.parts],
        )
        for turn in critic.critic_turns([picture, f"\n{golden['question']}"], entry["steps"])
    ]
    return pb.Prompt(system_message=critic.SYSTEM_MESSAGE, turns=turns)


@pytest.mark.parametrize("choices", [[], ["+"], ["+", "several tokens"], ["+", "+"], ["+", ""]])
async def test_words_that_cannot_be_scored_are_refused(tmp_path: Path, choices: list[str]) -> None:
    async with running(tmp_path) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ScoreTurns(pb.ScoreTurnsRequest(prompt=prompt("Hi"), choices=choices))
    assert type(from_rpc_error(caught.value, LlmUnavailable)) is InvalidRequest
