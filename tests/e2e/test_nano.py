"""InternVL-nano, served. It sees: a picture in the wrong place, a lost turn or a swapped frame changes its words."""

import asyncio
import io
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from deploy.local import LocalStack
from deploy.local.demo import NANO
from examples.nano.accuracy import Tally
from examples.nano.evaluate import Result, ask_all, messages_of, tally_of
from examples.nano.world import Scene, Situation, Thing, Writing, draw, held_out
from examples.nano.world.fonts import ink_box
from examples.nano.world.scene import Background
from examples.nano.world.vocabulary import COLOURS
from internvl_client import AsyncClient, Client, Image, Message
from internvl_client.types import Answer, CacheTier
from tests.e2e.conftest import StartStack

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        not (NANO / "model.safetensors").is_file(),
        reason="no trained InternVL-nano lies in examples/nano: `python -m examples.nano.train` makes it in hours",
    ),
]
PICTURES = Path(__file__).parents[2] / "examples/nano/pictures"
# Never trained on, and not the seed of the model card.
SEED, NUM_QUESTIONS, CONCURRENCY = 70_707, 200, 16
# What its card says, less what 200 questions may differ by. A picture in the wrong place costs far more than that.
LEAST_RIGHT, LEAST_OVERLAP = 0.9, 0.6
PAPER = Background("plain", (248, 248, 244), (248, 248, 244))


@pytest.fixture(scope="module")
def nano(start_stack: StartStack) -> Iterator[LocalStack]:
    stack = start_stack(NANO)
    yield stack
    stack.stop()


@pytest.fixture(scope="module")
def situations() -> list[Situation]:
    return list(held_out(SEED, NUM_QUESTIONS))


@pytest.fixture(scope="module")
def together(nano: LocalStack, situations: list[Situation]) -> list[Result]:
    """The answers to all questions, 16 asked at a time, no picture known before."""
    return asyncio.run(ask_all(nano.address, situations, CONCURRENCY))


@pytest.fixture
def client(nano: LocalStack) -> Iterator[Client]:
    with Client(nano.address, timeout_s=60) as client:
        yield client


def picture(*things: tuple[str, str, float, float], width: int = 150, height: int = 140) -> Image:
    """A picture of things, each a shape, a colour and where its middle is."""
    found = tuple(Thing(shape, colour, COLOURS[colour], x, y, 24) for shape, colour, x, y in things)
    return _image(Scene(width, height, PAPER, found))


def _image(scene: Scene) -> Image:
    stream = io.BytesIO()
    draw(scene).save(stream, "PNG")
    return Image.from_bytes(stream.getvalue())


def number(text: str) -> Image:
    face, size = "lato-bold", 56
    left, top, right, bottom = ink_box(text, face, size)
    x, y = round(75 - (left + right) / 2), round(60 - (top + bottom) / 2)
    box = (left + x, top + y, right + x, bottom + y)
    return _image(Scene(150, 120, PAPER, (), Writing(text, "blue", COLOURS["blue"], face, size, x, y, box)))


def frames(xs: Sequence[float]) -> list[str | Image]:
    """A clip of a disc that is at these places, one frame after another."""
    parts: list[str | Image] = []
    for index, x in enumerate(xs, start=1):
        still = picture(("circle", "red", x, 70))
        parts += [f"Frame{index}: ", Image(still.digest, still.content, max_tiles=1), "\n"]
    return parts


def test_the_words_are_right(together: list[Result]) -> None:
    tally: Tally = tally_of(together)
    assert len(together) == NUM_QUESTIONS
    assert tally.overall >= LEAST_RIGHT, tally.by_kind()
    assert tally.mean_overlap >= LEAST_OVERLAP


def test_known_pictures_give_the_same_words(
    nano: LocalStack, situations: list[Situation], together: list[Result]
) -> None:
    assert asyncio.run(ask_all(nano.address, situations, CONCURRENCY)) == together


def test_questions_asked_alone_give_the_same_words(
    nano: LocalStack, situations: list[Situation], together: list[Result]
) -> None:
    assert asyncio.run(ask_all(nano.address, situations[:40], concurrency=1)) == together[:40]


def test_neighbours_that_are_cancelled_change_nothing(
    nano: LocalStack, situations: list[Situation], together: list[Result]
) -> None:
    chance = random.Random(1)
    left = {index: chance.random() < 0.5 for index in range(60)}

    async def leave_early(client: AsyncClient, situation: Situation) -> None:
        async with client.stream(*messages_of(situation), system_message=situation.system_message) as stream:
            await anext(aiter(stream))

    async def run() -> dict[int, str]:
        answers: dict[int, str] = {}

        async def stay(client: AsyncClient, index: int) -> None:
            (result,) = await ask_all(nano.address, [situations[index]], 1)
            answers[index] = result.answer

        async with AsyncClient(nano.address, timeout_s=60) as client, asyncio.TaskGroup() as group:
            for index, leaves in left.items():
                group.create_task(leave_early(client, situations[index]) if leaves else stay(client, index))
        return answers

    assert asyncio.run(run()) == {index: together[index].answer for index, leaves in left.items() if not leaves}


def demo_dialogues() -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = json.loads((PICTURES / "questions.json").read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("dialogue", demo_dialogues(), ids=lambda dialogue: dialogue["pictures"][0])
def test_the_demos_dialogues_in_kept_conversations(client: Client, dialogue: dict[str, Any]) -> None:
    conversation = client.create_conversation()
    lead: list[str | Image] = []
    for index, name in enumerate(dialogue["pictures"], start=1):
        if dialogue["label"]:
            lead.append(("\n" if lead else "") + dialogue["label"].format(index))
        lead.append(Image.open(PICTURES / name, max_tiles=dialogue["max_tiles"]))
    answers = []
    for turn in dialogue["dialogue"]:
        answers.append(conversation.ask(*lead, turn["question"]).text)
        lead = []
    assert answers == [turn["answer"] for turn in dialogue["dialogue"]]


def test_pictures_keep_their_order(client: Client) -> None:
    star, square = picture(("star", "red", 75, 70)), picture(("square", "blue", 75, 70))

    def which(first: Image, second: Image, question: str) -> str:
        return client.ask("Image-1: ", first, "\nImage-2: ", second, f"\n{question}").text

    for question, of_star in (("Which image shows a star?", True), ("Which image shows a blue shape?", False)):
        assert which(star, square, question) == ("Image-1" if of_star else "Image-2")
        assert which(square, star, question) == ("Image-2" if of_star else "Image-1")


def test_each_of_three_pictures_is_read_in_its_place(client: Client) -> None:
    parts = ["Image-1: ", number("27"), "\nImage-2: ", number("485"), "\nImage-3: ", number("9")]
    asked = [client.ask(*parts, f"\nWhat number is in Image-{index}?").text for index in (1, 2, 3)]
    assert asked == ["27", "485", "9"]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_each_of_three_pictures_is_seen_in_its_place(client: Client, order: tuple[int, ...]) -> None:
    things = [(("star", "red"), ("square", "blue"), ("heart", "green"))[index] for index in order]
    parts: list[str | Image] = []
    for index, (shape, colour) in enumerate(things, start=1):
        parts += [f"Image-{index}: ", picture((shape, colour, 75, 70)), "\n"]
    seen = [client.ask(*parts, f"Which object is in Image-{index}?").text for index in (1, 2, 3)]
    assert seen == [f"a {colour} {shape}" for shape, colour in things]


def test_frames_keep_their_order(client: Client) -> None:
    places = [30.0, 60.0, 90.0, 120.0]
    ways = [client.ask(*frames(xs), "Which way does the circle move?").text for xs in (places, places[::-1])]
    assert ways == ["right", "left"]


def test_a_later_turn_needs_what_was_said_before(client: Client) -> None:
    """The same last question has another answer after another history."""
    shown = picture(("star", "red", 30, 30), ("square", "blue", 120, 110))
    answers = []
    for shape in ("star", "square"):
        conversation = client.create_conversation()
        where = conversation.ask(shown, f"Where is the {shape}?").text
        answers.append((where, conversation.ask("And what colour is it?").text))
    assert answers == [("top left", "red"), ("bottom right", "blue")]


def test_the_same_dialogue_kept_or_sent_whole(client: Client) -> None:
    shown = picture(("heart", "green", 30, 110), ("ring", "orange", 120, 30))
    conversation = client.create_conversation()
    questions = ["Where is the heart?", "And what colour is it?", "How many shapes are there?"]
    kept = [
        conversation.ask(shown, questions[0]).text,
        *(conversation.ask(question).text for question in questions[1:]),
    ]
    messages = [Message.user(shown, questions[0])]
    whole = []
    for index in range(len(questions)):
        whole.append(client.ask(*messages).text)
        if index + 1 < len(questions):
            messages += [Message.assistant(whole[-1]), Message.user(questions[index + 1])]
    assert whole == kept == ["bottom left", "green", "2"]


def test_a_picture_is_encoded_once_and_means_the_same_from_every_cache(client: Client) -> None:
    shown = picture(("diamond", "purple", 75, 70), width=151)
    answers: list[Answer] = [client.ask(shown, "What colour is the diamond?") for _ in range(3)]
    assert [answer.text for answer in answers] == ["purple"] * 3
    tiers = [answer.receipts[0].cache_tier for answer in answers]
    assert tiers[0] is CacheTier.NONE
    assert CacheTier.NONE not in tiers[1:]
