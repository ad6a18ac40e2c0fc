"""Boxes of answers: read exactly as the reference evaluator reads them, and drawn where they are."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from internvl_client import Box, draw_boxes, parse_boxes
from internvl_client.grounding import picture_size

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/grounding.json").read_text())
WHITE = (255, 255, 255)


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda entry: entry["text"])
def test_the_first_box_is_the_reference_s(entry: dict[str, Any]) -> None:
    boxes = parse_boxes(entry["text"], entry["width"], entry["height"])
    assert bool(boxes) == entry["found"]
    first = [[box.left, box.top, box.right, box.bottom] for box in boxes[:1]]
    assert first == ([entry["box_pixels"]] if entry["found"] else [])


def test_every_box_has_the_name_before_it() -> None:
    text = (
        "<ref>a cat</ref><box>[[0,0,500,500],[500,500,1000,1000]]</box> and <ref> b </ref><box>[[0,0,1000,500]]</box>"
    )
    assert parse_boxes(f"{text} or [1, 2, 3, 4]", 100, 200) == [
        Box(0, 0, 50, 100, "a cat"),
        Box(50, 100, 100, 200, "a cat"),
        Box(0, 0, 100, 100, "b"),
        *parse_boxes("[1, 2, 3, 4]", 100, 200),
    ]


@pytest.mark.parametrize(
    "text", ["", "<ref>cat</ref>", "<box>[[1,2,3]]</box>", "[[1,2,3,4,5,6,7,8]]", f"[{'9' * 60},1,2,3]", "[1e9,2,3,4]"]
)
def test_what_is_no_box_is_none(text: str) -> None:
    assert parse_boxes(text, 10, 10) == []


def test_a_name_ends_at_the_first_end_after_it() -> None:
    (box,) = parse_boxes("<ref>a<ref>b</ref></ref><box>[[0,0,500,500]]</box>", 100, 100)
    assert box == Box(0, 0, 50, 50, "a<ref>b")
    assert [box.label for box in parse_boxes("<ref>a</ref>[0,0,9,9]<ref>b [0,0,9,9]", 100, 100)] == ["a", "a"]


@pytest.mark.parametrize("unit", ["<ref>", "<ref></ref>", "[", "[1,", "[[1,2,3,4]]<ref>"])
def test_a_model_that_repeats_itself_for_ever_holds_nobody_up(unit: str) -> None:
    # Work that grew with the square of the length would take hours.
    boxes = parse_boxes(f"<ref>x</ref>{unit * 100_000}", 100, 100)
    assert len(boxes) == 100_000 * unit.count("]]")


@given(st.text("[]<>/refbox0123456789,. -", max_size=60), st.integers(1, 100_000), st.integers(1, 100_000))
def test_no_text_is_too_strange(text: str, width: int, height: int) -> None:
    for box in parse_boxes(text, width, height):
        assert isinstance(box, Box)


def picture(size: tuple[int, int] = (100, 60), orientation: int | None = None) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new("RGB", size, WHITE).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def pixels(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def test_a_box_is_drawn_on_its_edges_and_nowhere_else() -> None:
    drawn = pixels(draw_boxes(picture(), [Box(20, 10, 60, 40)], line_width=1))
    assert drawn.size == (100, 60)
    for corner in ((20, 10), (60, 40), (40, 10), (20, 25)):
        assert drawn.getpixel(corner) != WHITE
    for elsewhere in ((19, 9), (40, 25), (61, 41)):
        assert drawn.getpixel(elsewhere) == WHITE


def test_boxes_of_one_name_have_one_colour_and_others_another() -> None:
    boxes = [Box(1, 30, 20, 50, "a"), Box(30, 30, 50, 50, "a"), Box(60, 30, 80, 50, "b")]
    drawn = pixels(draw_boxes(picture(), boxes, line_width=1))
    first, second, third = (drawn.getpixel((round(box.right), 45)) for box in boxes)
    assert first == second != third


def test_boxes_beyond_the_picture_and_inside_out_are_drawn_at_its_edge() -> None:
    drawn = pixels(draw_boxes(picture(), [Box(90, 500, -50, 10)], line_width=1))
    assert drawn.getpixel((0, 30)) != WHITE
    assert drawn.getpixel((90, 59)) != WHITE


def test_a_label_in_any_script_spoils_nothing() -> None:
    assert pixels(draw_boxes(picture(), [Box(1, 1, 9, 9, "猫 😀 é")])).size == (100, 60)


def test_a_turned_picture_is_drawn_on_as_the_server_sees_it() -> None:
    turned = picture(orientation=6)
    assert (picture_size(turned), picture_size(turned, orientation="viewer")) == ((100, 60), (60, 100))
    assert pixels(draw_boxes(turned, [])).size == (100, 60)
    assert pixels(draw_boxes(turned, [], orientation="viewer")).size == (60, 100)


@pytest.mark.parametrize("content", [b"", b"no picture", picture()[:60]])
def test_bytes_that_are_no_picture_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="no picture"):
        draw_boxes(content, [])
