"""What a request may ask for beside its dialogue, and how a tile budget is shared."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.content import MediaPart, Medium, PreprocessOptions, VideoOptions
from gateway.dialogue import Limits
from gateway.events import ChatRequest, GenerationConfig
from gateway.options import check_options, share_tiles
from gateway.prompt import Tool
from shared.errors import InvalidRequest
from tests.gateway.fakes_gateway import user


def picture(max_tiles: int | None = None, thumbnail: bool | None = None) -> MediaPart:
    return MediaPart((Medium("a" * 64, PreprocessOptions(max_tiles, thumbnail)),))


def video(segment_count: int | None, max_tiles: int | None = None) -> MediaPart:
    return MediaPart((Medium("b" * 64, PreprocessOptions(max_tiles, video=VideoOptions(segment_count))),))


def shared(budget: int | None, *parts: MediaPart) -> list[int | None]:
    (message,) = share_tiles((user("Hi", *parts),), budget)
    return [medium.options.max_tiles for medium in message.media]


@pytest.mark.parametrize(
    ("budget", "parts", "max_tiles"),
    [
        (None, [picture(), picture(40)], [None, 40]),
        (12, [picture()], [11]),  # and a thumbnail
        (13, [picture()], [None]),  # as a picture without a budget
        (100, [picture()], [None]),
        (12, [picture(thumbnail=False)], [None]),
        (100, [picture(12)], [12]),
        (100, [picture(40)], [40]),
        (1, [picture()], [1]),
        (2, [picture()], [1]),  # two tiles would come with a thumbnail
        (3, [picture()], [2]),
        (2, [picture(thumbnail=False)], [2]),
        (10, [picture(2), picture()], [2, 4]),
        (11, [picture(), picture()], [4, 4]),
        (8, [video(8)], [None]),
        (16, [video(None, 6)], [1]),
        (24, [video(8, 6)], [2]),
        (16, [video(8), picture()], [None, 7]),
    ],
)
def test_each_medium_gets_an_equal_share(
    budget: int | None, parts: list[MediaPart], max_tiles: list[int | None]
) -> None:
    assert shared(budget, *parts) == max_tiles


@pytest.mark.parametrize(
    ("budget", "parts"), [(1, [picture(), picture()]), (7, [video(8)]), (7, [video(None)]), (15, [video(8), picture()])]
)
def test_a_budget_below_a_tile_for_each_picture_and_frame_is_refused(budget: int, parts: list[MediaPart]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        shared(budget, *parts)
    assert caught.value.field == "max_total_tiles"


def most_tiles(medium: Medium) -> int:
    """What the vision service makes of options at most."""
    options = medium.options
    each = options.max_tiles or (1 if options.video else 12)
    with_thumbnail = each + (1 if each > 1 and options.thumbnail is not False else 0)
    return with_thumbnail * ((options.video.segment_count or 8) if options.video else 1)


pictures = st.builds(picture, st.none() | st.integers(1, 40), st.none() | st.booleans())
videos = st.builds(video, st.none() | st.integers(1, 20), st.none() | st.integers(1, 12))


@given(st.integers(1, 200), st.lists(pictures | videos, min_size=1, max_size=6))
def test_the_budget_is_never_passed(budget: int, parts: list[MediaPart]) -> None:
    try:
        (message,) = share_tiles((user(*parts),), budget)
    except InvalidRequest:
        return
    assert sum(map(most_tiles, message.media)) <= budget
    # What asks for less than its share keeps its wish.
    for before, after in zip(parts, message.media, strict=True):
        assert most_tiles(after) <= most_tiles(before.media[0])
        if most_tiles(before.media[0]) <= budget // len(parts):
            assert after == before.media[0]


def request(**more: Any) -> ChatRequest:
    return ChatRequest((user("Hi"),), **more)


def test_what_is_well_formed_is_let_through() -> None:
    tools = (Tool("get_weather"), Tool("f.2-x", "d", '{"type": "object"}'))
    config = GenerationConfig(candidate_count=16, json_schema='{"type": "string"}')
    check_options(request(tools=tools, config=config, max_total_tiles=1), Limits())


@pytest.mark.parametrize(
    ("more", "reason", "field"),
    [
        ({"tools": (Tool(""),)}, "INVALID_REQUEST", "tools[0].name"),
        ({"tools": (Tool("a b"),)}, "INVALID_REQUEST", "tools[0].name"),
        ({"tools": (Tool("a" * 65),)}, "INVALID_REQUEST", "tools[0].name"),
        ({"tools": (Tool("a"), Tool("a"))}, "INVALID_REQUEST", "tools[1].name"),
        ({"tools": tuple(Tool(f"t{i}") for i in range(4))}, "INVALID_REQUEST", "tools"),
        ({"tools": (Tool("a", "x" * 101),)}, "INVALID_REQUEST", "tools"),
        ({"tools": (Tool("a", "", "[]"),)}, "INVALID_JSON_SCHEMA", "tools[0].parameters_json_schema"),
        ({"tools": (Tool("a", "", "{"),)}, "INVALID_JSON_SCHEMA", "tools[0].parameters_json_schema"),
        (
            {"config": GenerationConfig(candidate_count=0)},
            "INVALID_GENERATION_CONFIG",
            "generation_config.candidate_count",
        ),
        (
            {"config": GenerationConfig(candidate_count=17)},
            "INVALID_GENERATION_CONFIG",
            "generation_config.candidate_count",
        ),
        ({"config": GenerationConfig(json_schema="{")}, "INVALID_JSON_SCHEMA", "generation_config.json_schema"),
        ({"config": GenerationConfig(json_schema="3")}, "INVALID_JSON_SCHEMA", "generation_config.json_schema"),
        ({"config": GenerationConfig(json_schema="[" * 90)}, "INVALID_JSON_SCHEMA", "generation_config.json_schema"),
        ({"max_total_tiles": 0}, "INVALID_REQUEST", "max_total_tiles"),
    ],
)
def test_what_no_service_could_do_is_refused(more: dict[str, Any], reason: str, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_options(request(**more), Limits(tools=3, text_chars=100))
    assert (caught.value.reason, caught.value.field) == (reason, field)
