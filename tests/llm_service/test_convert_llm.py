"""What comes over the wire is checked field by field."""

import math

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from gateway.events import GenerateRequest
from gateway.prompt import Prompt
from gateway.stage_messages import generate_request
from internvl_serving.common.v1 import embedding_pb2, generation_pb2
from internvl_serving.llm.v1 import llm_service_pb2 as pb
from llm_service import convert
from llm_service.engine.sequence import Priority
from llm_service.prompt.dialogue import Role, TextSegment, Tool, ToolCallSegment
from shared.embedding import EmbeddingKey
from shared.errors import EmbeddingHandleInvalid, EmbeddingNotFound, InvalidGenerationConfig, InvalidRequest
from shared.rpc.handles import HandleSigner

STOP_IDS = frozenset({7})
SIGNER = HandleSigner("key")


def options(**fields: object) -> object:
    return convert.options_of(generation_pb2.GenerationConfig(**fields), 100, STOP_IDS)  # type: ignore[arg-type]


def test_an_empty_config_is_greedy_with_the_services_default_length() -> None:
    parsed = convert.options_of(generation_pb2.GenerationConfig(), 100, STOP_IDS)
    assert parsed.sampling.is_greedy
    assert parsed.sampling.max_output_tokens == 100
    assert parsed.sampling.stop_token_ids == STOP_IDS
    assert parsed.num_beams == 1


def test_ignoring_the_end_takes_the_stop_tokens_away() -> None:
    parsed = convert.options_of(generation_pb2.GenerationConfig(ignore_end=True), 100, STOP_IDS)
    assert parsed.sampling.stop_token_ids == frozenset()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 101.0),
        ("top_p", 0.0),
        ("top_p", -1.0),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("top_k", -1),
        ("min_p", -0.5),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -2.0),
        ("repetition_penalty", math.nan),
        ("max_output_tokens", 0),
        ("max_output_tokens", -5),
        ("num_beams", 0),
        ("num_beams", 17),
        ("candidate_count", 0),
        ("candidate_count", -1),
        ("candidate_count", 17),
        ("top_logprobs", -1),
        ("top_logprobs", 21),
        ("visual_position_stride", 0),
        ("visual_position_stride", -2),
        ("visual_position_stride", 3),
        ("visual_position_stride", 512),
        ("stop_sequences", ["x"] * 10_000),
        ("stop_sequences", [""]),
        ("stop_sequences", ["x" * 257]),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidGenerationConfig) as refused:
        options(**{field: value})
    assert refused.value.field == f"generation_config.{field}"


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-6])
def test_a_temperature_too_small_to_divide_by_is_greedy(temperature: float) -> None:
    config = generation_pb2.GenerationConfig(temperature=temperature)
    assert convert.options_of(config, 100, STOP_IDS).sampling.is_greedy


def test_more_turns_than_any_dialogue_has_are_refused() -> None:
    with pytest.raises(InvalidRequest):
        convert.dialogue_of(pb.Prompt(turns=[pb.Turn()] * (convert.MAX_TURNS + 1)), SIGNER)


@pytest.mark.parametrize(
    "others",
    [
        {"temperature": 1.5},
        {"repetition_penalty": 1.5},
        {"candidate_count": 2},
        {"top_logprobs": 0},
        {"json_schema": "{}"},
    ],
)
def test_beam_search_takes_nothing_that_it_cannot_do(others: dict[str, object]) -> None:
    with pytest.raises(InvalidGenerationConfig) as refused:
        options(num_beams=2, **others)
    assert refused.value.field == "generation_config.num_beams"
    options(num_beams=1, **others)


def test_an_endless_answer_meets_no_schema() -> None:
    with pytest.raises(InvalidGenerationConfig):
        options(ignore_end=True, json_schema="{}")


@pytest.mark.parametrize(
    ("fields", "computed", "told"),
    [
        ({}, None, False),
        ({"top_logprobs": 0}, 0, True),
        ({"top_logprobs": 5, "candidate_count": 2}, 5, True),
        ({"candidate_count": 2}, 0, False),
    ],
)
def test_log_probabilities_are_computed_where_they_are_needed(
    fields: dict[str, int], computed: int | None, told: bool
) -> None:
    parsed = convert.options_of(generation_pb2.GenerationConfig(**fields), 100, STOP_IDS)  # type: ignore[arg-type]
    assert parsed.sampling.top_logprobs == computed
    assert parsed.tells_logprobs is told


@pytest.mark.parametrize("in_background", [False, True])
def test_a_gateway_says_whether_somebody_waits(*, in_background: bool) -> None:
    asked = generate_request(GenerateRequest(Prompt(None, ()), in_background=in_background))
    assert convert.priority_of(asked) is (Priority.BACKGROUND if in_background else Priority.INTERACTIVE)
    assert convert.priority_of(pb.GenerateRequest()) is Priority.INTERACTIVE


@pytest.mark.parametrize("stride", [1, 2, 128, 256])
def test_strides_are_powers_of_two(stride: int) -> None:
    config = generation_pb2.GenerationConfig(visual_position_stride=stride)
    assert convert.options_of(config, 100, STOP_IDS).visual_stride == stride
    assert convert.options_of(generation_pb2.GenerationConfig(), 100, STOP_IDS).visual_stride == 256


@pytest.mark.parametrize("choices", [[], ["+"], ["+"] * 17, ["+", ""], ["+", "x" * 65]])
def test_choices_too_few_too_many_or_too_long_are_refused(choices: list[str]) -> None:
    with pytest.raises(InvalidRequest):
        convert.choices_of(pb.ScoreTurnsRequest(choices=choices))


def test_turns_and_segments_become_a_dialogue() -> None:
    prompt = pb.Prompt(
        system_message="",
        turns=[
            pb.Turn(role=generation_pb2.ROLE_USER, segments=[pb.Segment(text="a")]),
            pb.Turn(role=generation_pb2.ROLE_ASSISTANT, segments=[pb.Segment(text="b")]),
            pb.Turn(role=generation_pb2.ROLE_USER, segments=[pb.Segment(text="c")]),
        ],
    )
    dialogue = convert.dialogue_of(prompt, SIGNER)
    assert dialogue.system_message == ""
    assert [turn.role for turn in dialogue.turns] == [Role.USER, Role.ASSISTANT, Role.USER]
    assert dialogue.turns[0].segments == (TextSegment("a"),)
    assert convert.dialogue_of(pb.Prompt(turns=prompt.turns), SIGNER).system_message is None
    assert dialogue.tenant == ""
    prompt.tenant = "acme"
    assert convert.dialogue_of(prompt, SIGNER).tenant == "acme"
    prompt.tenant = "é" * 65
    with pytest.raises(InvalidRequest) as caught:
        convert.dialogue_of(prompt, SIGNER)
    assert caught.value.field == "prompt.tenant"


@pytest.mark.parametrize(
    "segment",
    [
        pb.Segment(),
        pb.Segment(visual=pb.VisualSegment()),
        pb.Segment(visual=pb.VisualSegment(embeddings=[embedding_pb2.EmbeddingHandle(digest="../../etc")])),
        pb.Segment(visual=pb.VisualSegment(embeddings=[embedding_pb2.EmbeddingHandle(digest="a" * 64, tile_count=1)])),
    ],
)
def test_a_segment_that_is_neither_text_nor_a_sound_handle_is_refused(segment: pb.Segment) -> None:
    with pytest.raises(InvalidRequest):
        convert.dialogue_of(pb.Prompt(turns=[pb.Turn(role=generation_pb2.ROLE_USER, segments=[segment])]), SIGNER)


def test_a_turn_without_a_role_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        convert.dialogue_of(pb.Prompt(turns=[pb.Turn(segments=[pb.Segment(text="a")])]), SIGNER)


def user(*segments: pb.Segment) -> pb.Turn:
    return pb.Turn(role=generation_pb2.ROLE_USER, segments=segments)


def video(frame: int | None, frame_count: int = 4, **changes: int) -> pb.Segment:
    handle = embedding_pb2.EmbeddingHandle(
        digest="a" * 64,
        tile_count=4,
        token_count=16,
        hidden_size=8,
        data_type=embedding_pb2.DATA_TYPE_FLOAT32,
        frame_count=frame_count,
        media_digest="b" * 64,
        tenant="acme",
        expire_time=Timestamp(seconds=1 << 33),
    )
    handle.MergeFrom(embedding_pb2.EmbeddingHandle(**changes))  # type: ignore[arg-type]
    SIGNER.sign(handle)
    return pb.Segment(visual=pb.VisualSegment(embeddings=[handle], frame=frame))


def test_a_frame_is_its_rows_of_the_videos_embedding() -> None:
    dialogue = convert.dialogue_of(pb.Prompt(turns=[user(video(3), video(None))]), SIGNER)
    assert [(run.offset, run.length) for run in dialogue.slices] == [(12, 4), (0, 16)]
    assert len(set(dialogue.embeddings)) == 1


def test_a_reference_says_whose_medium_it_was_and_keeps_its_handle() -> None:
    segment = video(None)
    (ref,) = convert.dialogue_of(pb.Prompt(turns=[user(segment)]), SIGNER).embeddings
    assert ref.key == EmbeddingKey("a" * 64, "b" * 64, "acme")
    assert embedding_pb2.EmbeddingHandle.FromString(ref.handle) == segment.visual.embeddings[0]


def test_a_handle_of_another_key_or_changed_since_is_refused() -> None:
    def changed(**fields: object) -> pb.Segment:
        segment = video(None)
        segment.visual.embeddings[0].MergeFrom(embedding_pb2.EmbeddingHandle(**fields))  # type: ignore[arg-type]
        return segment

    for segment in (changed(tenant="other"), changed(source="elsewhere:1"), changed(token_count=32)):
        with pytest.raises(EmbeddingHandleInvalid):
            convert.dialogue_of(pb.Prompt(turns=[user(segment)]), SIGNER)
    with pytest.raises(EmbeddingHandleInvalid):
        convert.dialogue_of(pb.Prompt(turns=[user(video(None))]), HandleSigner("another key"))


def test_a_handle_that_has_expired_is_one_whose_embedding_is_not_found() -> None:
    with pytest.raises(EmbeddingNotFound) as missing:
        convert.dialogue_of(pb.Prompt(turns=[user(video(None))]), HandleSigner("key", clock=lambda: float(1 << 33)))
    assert missing.value.resource == "a" * 64


@pytest.mark.parametrize("segment", [video(-1), video(4), video(0, 0), video(0, 3), video(0, -4)])
def test_a_frame_that_the_video_does_not_have_is_refused(segment: pb.Segment) -> None:
    with pytest.raises(InvalidRequest):
        convert.dialogue_of(pb.Prompt(turns=[user(segment)]), SIGNER)


def call(name: str = "look", arguments_json: str = "{}") -> pb.Segment:
    return pb.Segment(tool_call=generation_pb2.ToolCall(name=name, arguments_json=arguments_json))


def tool_prompt(*calls: pb.Segment, results: int = 1, **tool: str) -> pb.Prompt:
    said = [
        user(pb.Segment(text="a")),
        pb.Turn(role=generation_pb2.ROLE_ASSISTANT, segments=calls),
        pb.Turn(role=generation_pb2.ROLE_TOOL, segments=[pb.Segment(text=f"r{index}") for index in range(results)]),
    ]
    return pb.Prompt(turns=said, tools=[generation_pb2.Tool(**({"name": "look"} | tool))])  # type: ignore[arg-type]


def test_calls_and_their_results_become_turns_a_result_each() -> None:
    dialogue = convert.dialogue_of(tool_prompt(call(), call(), results=2), SIGNER)
    assert [turn.role for turn in dialogue.turns] == [Role.USER, Role.ASSISTANT, Role.TOOL, Role.TOOL]
    assert dialogue.turns[1].segments == (ToolCallSegment("look", "{}"),) * 2
    assert dialogue.turns[3].segments == (TextSegment("r1"),)
    assert dialogue.tools == (Tool("look"),)


@pytest.mark.parametrize(
    "prompt",
    [
        tool_prompt(call(name="")),
        tool_prompt(call(name="no spaces")),
        tool_prompt(call(arguments_json="[]")),
        tool_prompt(call(arguments_json="{")),
        tool_prompt(call(), name="x" * 65),
        tool_prompt(call(), parameters_json_schema="3"),
        pb.Prompt(turns=[user(call())]),
        pb.Prompt(turns=[pb.Turn(role=generation_pb2.ROLE_TOOL, segments=[pb.Segment(text="r")])]),
    ],
)
def test_tools_calls_and_results_that_cannot_be_written_are_refused(prompt: pb.Prompt) -> None:
    with pytest.raises(InvalidRequest):
        convert.dialogue_of(prompt, SIGNER)
