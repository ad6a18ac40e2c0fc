"""Measuring a system: what is asked, what the figures mean, and the command."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
import pytest
from PIL import Image as PillowImage

from internvl_client import AsyncClient
from internvl_client.bench import (
    SCENARIOS,
    Exchange,
    GatewayTarget,
    Question,
    Round,
    Spread,
    Summary,
    TargetError,
    Workload,
    ask_round,
    calibrate,
)
from internvl_client.bench.pictures import draw_picture
from internvl_client.bench.questions import TextLength, questions_of
from tests.client.command_line import run
from tests.client.fake_gateway import FakeGateway, Responses
from tests.client.fake_gateway import refuse as end_call
from tests.client.fake_target import FakeTarget, exchange, refuse

PICTURES = Workload("pictures", pictures=2, dialogues=3)


def busy(request: Any, context: grpc.ServicerContext) -> Responses:
    end_call(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    yield from ()


def test_times_of_an_answer_come_from_its_pieces() -> None:
    answer = exchange(0.5, 0.6, 0.9, 1.0, num_output_tokens=6)
    assert answer.ttft_s == 0.5
    assert answer.tpot_s == pytest.approx(0.5 / 5)  # five tokens after the first, whatever pieces they came in
    assert answer.longest_gap_s == pytest.approx(0.3)


def test_an_answer_in_one_piece_has_no_time_per_token() -> None:
    answer = exchange(0.5, num_output_tokens=6)
    assert (answer.tpot_s, answer.longest_gap_s) == (None, None)
    assert Spread.of([answer.tpot_s]) is None


def test_medians_and_rates_leave_failed_questions_out() -> None:
    failed = Exchange(error="nobody is there")
    first = Round(((exchange(1.0, 2.0),), (exchange(3.0, 4.0),)), 2.0)
    summary = Summary.of([first, Round(((exchange(9.0, 10.0),), (failed,)), 4.0)])
    assert summary.ttft_s == Spread(3.0, 1.0, 9.0, 3)
    assert summary.requests_per_s == Spread(0.625, 0.25, 1.0, 2)
    assert summary.output_tokens_per_s == Spread(1.25, 0.5, 2.0, 2)
    assert (summary.num_asked, summary.failures) == (4, {"nobody is there": 1})


def test_waits_are_told_turn_by_turn() -> None:
    dialogues = ((exchange(4.0), exchange(1.0)), (exchange(6.0), exchange(3.0)))
    first, second = Summary.of([Round(dialogues, 1.0)]).turn_ttft_s
    assert first is not None
    assert second is not None
    assert (first.median, second.median) == (5.0, 2.0)


def test_a_seed_asks_the_same_and_another_round_asks_anew() -> None:
    asked = questions_of(PICTURES, 1, 0)
    assert asked == questions_of(PICTURES, 1, 0)
    pictures = [
        picture
        for seed, index in ((1, 0), (1, 1), (2, 0))
        for (question,) in questions_of(PICTURES, seed, index)
        for picture in question.pictures
    ]
    assert len(set(pictures)) == len(pictures) == 18


def test_pictures_may_be_the_same_in_all_dialogues_of_a_round() -> None:
    asked = questions_of(Workload("same", pictures=1, dialogues=3, same_pictures=True), 1, 0)
    assert len({dialogue[0].pictures for dialogue in asked}) == 1
    assert len({dialogue[0].text for dialogue in asked}) == 3


def test_only_the_first_turn_has_pictures() -> None:
    ((first, *others),) = questions_of(SCENARIOS["turns4"], 1, 0)
    assert len(first.pictures) == 1
    assert [question.pictures for question in others] == [()] * 3


def test_drawn_pictures_have_the_size_that_was_asked_for() -> None:
    with PillowImage.open(BytesIO(draw_picture(451, 13, "seed"))) as picture:
        picture.load()
        assert (picture.format, picture.size, picture.mode) == ("PNG", (451, 13), "RGB")
        colours = picture.getcolors()
    assert colours is not None
    assert len(colours) == 57 * 2  # squares of eight pixels, the last ones cut


async def test_a_round_keeps_to_its_concurrency_and_tells_of_every_answer() -> None:
    target, done = FakeTarget(), []
    workload = Workload("few", dialogues=6, concurrency=2, turns=2)
    asked = await ask_round(workload, target, seed=1, on_done=lambda: done.append(1))
    assert (target.most_at_once, len(target.asked), len(done)) == (2, 12, 12)
    assert [len(dialogue) for dialogue in asked.dialogues] == [2] * 6


async def test_a_failed_question_ends_its_dialogue_and_no_other() -> None:
    asked = await ask_round(Workload("failing", dialogues=2, turns=3), FakeTarget(refuse), seed=1)
    assert [[each.error for each in dialogue] for dialogue in asked.dialogues] == [["nobody is there"]] * 2


async def test_a_picture_asked_about_before_comes_again_and_is_not_measured() -> None:
    target = FakeTarget()
    asked = await ask_round(SCENARIOS["same"], target, seed=1)
    before, measured = target.asked
    assert before.pictures == measured.pictures
    assert before.text != measured.text
    assert len(asked.exchanges) == 1


async def test_text_is_as_long_as_the_targets_tokens_ask_for() -> None:
    """A model whose tokens are half words, with ten of its template around a question."""
    target = FakeTarget(lambda question: exchange(1.0, num_prompt_tokens=10 + 2 * len(question.text.split())))
    assert await calibrate(target, seed=1) == TextLength(0.5)


async def test_a_gateway_is_asked_for_answers_of_an_exact_length(gateway: FakeGateway) -> None:
    async with AsyncClient(gateway.address) as client, GatewayTarget(client).dialogue(1) as dialogue:
        answered = await dialogue.ask(Question("What?", (b"a picture",)), 7)
    (request,) = gateway.chats
    assert (request.generation_config.max_output_tokens, request.generation_config.ignore_end) == (7, True)
    assert (len(answered.piece_times_s), answered.num_output_tokens, answered.num_prompt_tokens) == (2, 3, 9)


async def test_turns_are_a_conversation_that_is_removed_afterwards(gateway: FakeGateway) -> None:
    async with AsyncClient(gateway.address) as client, GatewayTarget(client).dialogue(2) as dialogue:
        assert len(gateway.conversations) == 1
        await dialogue.ask(Question("And?"), 7)
    assert gateway.chats[0].conversation_id == "c0"
    assert gateway.conversations == {}


async def test_what_a_gateway_refuses_is_told_with_its_reason(gateway: FakeGateway) -> None:
    gateway.answer = busy
    async with AsyncClient(gateway.address) as client, GatewayTarget(client).dialogue(1) as dialogue:
        with pytest.raises(TargetError, match="QUEUE_FULL"):
            await dialogue.ask(Question("What?"), 7)


def test_the_command_measures_shows_and_writes(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "figures.json"
    options = ("--scenario", "text1", "-s", "same8", "--output-tokens", "5", "--rounds", "2", "--seed", "3")
    code, shown = run(capsys, monkeypatch, "bench", "--address", gateway.address, *options, "--json", file)
    assert code == 0
    assert "first token s" in shown
    figures = json.loads(file.read_text())
    assert [entry["workload"]["name"] for entry in figures["workloads"]] == ["text1", "same8"]
    assert [entry["summary"]["num_asked"] for entry in figures["workloads"]] == [2, 16]
    again = run(capsys, monkeypatch, "bench", "--address", gateway.address, "--workload", file, "--rounds", "1")
    assert again[0] == 0
    assert "same8" in again[1]


def test_options_alone_are_a_workload_of_their_own(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--pictures", "2", "--picture-size", "20x30", "--dialogues", "2", "--rounds", "1", "--no-warmup")
    assert run(capsys, monkeypatch, "bench", "--address", gateway.address, *options)[0] == 0
    asked = gateway.chats[2:]  # behind the two that tell how long texts have to be
    assert [len([part for part in chat.messages[0].parts if part.HasField("media")]) for chat in asked] == [2, 2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--scenario", "nothing"), "there is no scenario nothing; there are text1"),
        (("--picture-size", "large"), "--picture-size has to be like 448x448"),
        (("--concurrency", "2", "--rate", "3"), "Give concurrency or rate_per_s, not both."),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _ = run(capsys, monkeypatch, "bench", "--address", "127.0.0.1:1", *options)
    assert said in str(code)


def test_questions_that_fail_make_the_command_fail(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = gateway.answer

    def answer_calibration(request: Any, context: grpc.ServicerContext) -> Responses:
        return (answer if len(gateway.chats) <= 2 else busy)(request, context)

    gateway.answer = answer_calibration
    options = ("--scenario", "text1", "--rounds", "2", "--no-warmup")
    code, _ = run(capsys, monkeypatch, "bench", "--address", gateway.address, *options)
    assert "2 of 2 questions failed" in code


@pytest.mark.parametrize("content", [{"turns": 0}, {"pictures": "two"}, {"size": 3}, {"picture_size": [1]}])
def test_a_workload_that_makes_no_sense_is_refused(content: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"turns|pictures|size"):
        Workload.from_json(content)


def test_a_workload_is_read_as_it_was_written() -> None:
    for workload in SCENARIOS.values():
        assert Workload.from_json(json.loads(json.dumps(workload.to_json()))) == workload
