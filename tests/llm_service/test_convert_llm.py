"""What comes over the wire is checked field by field."""

import math

import pytest

from internvl_serving.common.v1 import embedding_pb2, generation_pb2
from internvl_serving.llm.v1 import llm_service_pb2 as pb
from llm_service import convert
from llm_service.prompt.dialogue import Role, TextSegment
from shared.errors import InvalidGenerationConfig, InvalidRequest

STOP_IDS = frozenset({7})


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
        convert.dialogue_of(pb.Prompt(turns=[pb.Turn()] * (convert.MAX_TURNS + 1)))


@pytest.mark.parametrize("field", ["temperature", "repetition_penalty"])
def test_beam_search_with_sampling_is_refused(field: str) -> None:
    with pytest.raises(InvalidGenerationConfig):
        options(num_beams=2, **{field: 1.5})


def test_turns_and_segments_become_a_dialogue() -> None:
    prompt = pb.Prompt(
        system_message="",
        turns=[
            pb.Turn(role=generation_pb2.ROLE_USER, segments=[pb.Segment(text="a")]),
            pb.Turn(role=generation_pb2.ROLE_ASSISTANT, segments=[pb.Segment(text="b")]),
            pb.Turn(role=generation_pb2.ROLE_USER, segments=[pb.Segment(text="c")]),
        ],
    )
    dialogue = convert.dialogue_of(prompt)
    assert dialogue.system_message == ""
    assert [turn.role for turn in dialogue.turns] == [Role.USER, Role.ASSISTANT, Role.USER]
    assert dialogue.turns[0].segments == (TextSegment("a"),)
    assert convert.dialogue_of(pb.Prompt(turns=prompt.turns)).system_message is None


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
        convert.dialogue_of(pb.Prompt(turns=[pb.Turn(role=generation_pb2.ROLE_USER, segments=[segment])]))


def test_a_turn_without_a_role_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        convert.dialogue_of(pb.Prompt(turns=[pb.Turn(segments=[pb.Segment(text="a")])]))
