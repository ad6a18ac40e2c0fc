"""Measuring a served model, and what the card says of it."""

import json
from pathlib import Path

import pytest

from examples.nano.accuracy import Tally, overlap
from examples.nano.card import draw_curve, write_card
from examples.nano.evaluate import Result, ask_all, messages_of, table, tally_of
from examples.nano.world import Kind, held_out, situation
from internvl_client import ImageGroup, Role

SITUATIONS = [situation(31, index) for index in range(80)]


def test_half_covered_boxes_overlap_by_a_third() -> None:
    assert overlap("<box>[[0, 0, 100, 100]]</box>", "<box>[[50, 0, 150, 100]]</box>") == pytest.approx(1 / 3)


@pytest.mark.parametrize("answer", ["", "I cannot see that.", "[[0, 0, 0, 0]]", "[[200, 200, 300, 300]]"])
def test_what_is_no_box_there_does_not_overlap(answer: str) -> None:
    assert overlap(answer, "[[0, 0, 100, 100]]") == 0


def test_the_client_says_what_the_world_says() -> None:
    for found in SITUATIONS:
        messages, dialogue = messages_of(found), found.dialogues[0]
        assert [message.role for message in messages] == [Role.USER, Role.ASSISTANT] * (len(dialogue) - 1) + [Role.USER]
        assert [message.text.strip() for message in messages[::2]] == [turn.question for turn in dialogue]
        assert [message.text for message in messages[1::2]] == [turn.answer for turn in dialogue[:-1]]
        shown = [image for message in messages for image in message.images]
        assert {image.max_tiles for image in shown} <= {medium.max_tiles for medium in found.media}
        assert all(image.content for image in shown)


def test_pictures_of_the_combined_form_are_one_group() -> None:
    parts = [part for found in SITUATIONS for message in messages_of(found) for part in message.parts]
    assert any(isinstance(part, ImageGroup) and len(part.images) > 1 for part in parts)


def test_only_the_exact_answer_is_right() -> None:
    results = [
        Result(Kind.COLOUR, "?", "red", "red"),
        Result(Kind.COLOUR, "?", "red", "Red"),
        Result(Kind.GROUNDING, "?", "[[0, 0, 100, 100]]", "[[0, 0, 100, 50]]"),
    ]
    tally = tally_of(results)
    assert tally.by_kind() == {"colour": 0.5, "grounding": 0.0}
    assert tally.overall == 0.5
    assert tally.mean_overlap == 0.5
    assert "MISSED" in table(tally)


async def test_asking_nothing_needs_no_gateway() -> None:
    assert await ask_all("127.0.0.1:1", held_out(1, 0), concurrency=2) == []


def test_the_card_prefers_what_was_measured_through_the_system(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(json.dumps(record()))
    write_card(tmp_path)
    assert "in the training process" in (tmp_path / "README.md").read_text()
    served = Tally()
    served.add("number", True)
    (tmp_path / "evaluation.json").write_text(json.dumps(served.as_json()))
    write_card(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "through the running system (gateway" in card
    assert "| number | a number of up to four digits | 1 | 100.0% | 95% |" in card


def test_a_curve_can_be_drawn_of_no_points_at_all() -> None:
    assert draw_curve([]).size == draw_curve(record()["history"]).size  # type: ignore[arg-type]


def record() -> dict[str, object]:
    tally = Tally()
    tally.add("colour", False)
    points = [{"seconds": 60 * n, "overall": n / 3, "iou": 0.1 * n, "loss": 3.0 - n} for n in range(3)]
    facts = {"parameters": 10, "held_out_seed": 1, "seed": 1, "situations": 3, "answers": 4, "steps": 2, "hours": 0.1}
    facts |= {"seeing": 1, "easy": 0, "answering": 0, "learning_rate": 1e-3}
    return facts | {"machine": "m", "shape": "tiny", "history": points, "in_process": tally.as_json()}
