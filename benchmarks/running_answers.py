"""Answers that run while pictures arrive: what is asked of a target, and the figures of each round."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Final

from benchmarks.command import progress
from benchmarks.contender import Contender
from benchmarks.machine import CpuMeter
from internvl_client.bench import Exchange, Question, Target, TargetError, Workload
from internvl_client.bench.questions import questions_of, text_of
from internvl_client.bench.target import OnText

_LONG, _SHORT = 200, 16  # tokens of the running answers, and of others
_PICTURES: Final = 4
_TEXTS_BEFORE: Final = 10  # of the running answer, before the pictures arrive
_PAUSE_S: Final = 1.0  # between the pictures and the question


@dataclass(frozen=True, slots=True)
class HeadOfLine:
    """One round: the longest gap in the running answer, and the waits for first tokens, in seconds."""

    gap_s: float
    question_ttft_s: float
    picture_ttft_s: tuple[float, ...]
    others_cores: float


@dataclass(frozen=True, slots=True)
class Beside:
    """One round of running answers: time per token and longest gap of each, and how many pictures were answered."""

    tpot_s: tuple[float, ...]
    gap_s: tuple[float, ...]
    num_pictures: int
    others_cores: float


async def ask(target: Target, question: Question, num_tokens: int, on_text: OnText = lambda: None) -> Exchange:
    """Ask one question and return how it was answered; raise `TargetError`."""
    async with target.dialogue(1) as dialogue:
        return await dialogue.ask(question, num_tokens, on_text)


async def head_of_line(
    target: Target, seed: str, pause_s: float = _PAUSE_S
) -> tuple[Exchange, Exchange, list[Exchange]]:
    """Return the running answer, the question without a picture, and those with one; raise `TargetError`.

    The pictures come once the running answer has begun, the question `pause_s` later.
    """
    pictures = [_picture_question(f"{seed}:{index}") for index in range(_PICTURES)]
    running = asyncio.Event()
    texts = count(1)
    async with _failing_alone(), asyncio.TaskGroup() as tasks:
        story = tasks.create_task(
            ask(target, _story(seed), _LONG, lambda: running.set() if next(texts) == _TEXTS_BEFORE else None)
        )
        story.add_done_callback(lambda _: running.set())
        await running.wait()
        asked = [tasks.create_task(ask(target, question, _SHORT)) for question in pictures]
        await asyncio.sleep(pause_s)
        question = tasks.create_task(ask(target, Question(text_of(8, f"question:{seed}")), _SHORT))
    return story.result(), question.result(), [task.result() for task in asked]


async def beside(target: Target, seed: str, num_streams: int, *, with_pictures: bool) -> tuple[list[Exchange], int]:
    """Return running answers, and how many pictures were asked about meanwhile; raise `TargetError`."""
    num_answered = 0

    async def ask_about_pictures() -> None:
        nonlocal num_answered
        for index in count():
            await ask(target, _picture_question(f"{seed}:{index}"), 1)
            num_answered += 1

    async with _failing_alone(), asyncio.TaskGroup() as tasks:
        streams = [tasks.create_task(ask(target, _story(f"{seed}:{index}"), _LONG)) for index in range(num_streams)]
        pictures = tasks.create_task(ask_about_pictures()) if with_pictures else None
        await asyncio.gather(*streams)
        if pictures:
            pictures.cancel()
    return [task.result() for task in streams], num_answered


@asynccontextmanager
async def _failing_alone() -> AsyncIterator[None]:
    """Raise the first error of a task group instead of the group of them."""
    try:
        yield
    except ExceptionGroup as errors:
        refused, others = errors.split(TargetError)
        if refused is None or others is not None:
            raise
        raise refused.exceptions[0] from None


def _picture_question(seed: str) -> Question:
    workload = Workload(f"picture:{seed}", pictures=1)
    ((question,),) = questions_of(workload, 0, 0)
    return question


def _story(seed: str) -> Question:
    return Question(f"tell a long story {text_of(24, f'story:{seed}')}")


class Streams:
    """Measures contenders in turns, round by round; keeps the figures by their names."""

    def __init__(self, contenders: Sequence[Contender], seed: int, rounds: int) -> None:
        self._contenders = contenders
        self._seed = seed
        self._rounds = rounds
        self.lines: dict[str, list[HeadOfLine]] = {each.name: [] for each in contenders}
        self.alone: dict[str, list[Beside]] = {each.name: [] for each in contenders}
        self.beside: dict[str, list[Beside]] = {each.name: [] for each in contenders}

    def measure_lines(self) -> None:
        """Measure the head of the line; raise `PeerError`."""
        for index in range(self._rounds):
            for each in self._contenders:
                found = each.runner.run(self._line(each, index))
                self.lines[each.name].append(found)
                progress(f"line round {index + 1}  {each.name:<17} gap {found.gap_s:.2f} s")

    def measure_beside(self, num_streams: int) -> None:
        """Measure running answers without and with pictures beside them, in turns; raise `PeerError`."""
        for index in range(self._rounds):
            for each in self._contenders:
                for kept, with_pictures in ((self.alone, False), (self.beside, True)):
                    found = each.runner.run(self._beside(each, index, num_streams, with_pictures=with_pictures))
                    kept[each.name].append(found)
                progress(f"beside round {index + 1}  {each.name:<17} {found.num_pictures} pictures")

    async def _line(self, each: Contender, index: int) -> HeadOfLine:
        async with each.asked() as target:
            meter = CpuMeter(each.peer.pids)
            story, question, pictures = await head_of_line(target, f"line:{self._seed}:{index}")
        waits = tuple(exchange.ttft_s for exchange in pictures)
        return HeadOfLine(story.longest_gap_s or 0.0, question.ttft_s, waits, meter.read().others)

    async def _beside(self, each: Contender, index: int, num_streams: int, *, with_pictures: bool) -> Beside:
        async with each.asked() as target:
            meter = CpuMeter(each.peer.pids)
            seed = f"beside:{self._seed}:{index}:{with_pictures}"
            exchanges, num_pictures = await beside(target, seed, num_streams, with_pictures=with_pictures)
        tpot_s = tuple(exchange.tpot_s for exchange in exchanges if exchange.tpot_s is not None)
        gap_s = tuple(exchange.longest_gap_s for exchange in exchanges if exchange.longest_gap_s is not None)
        return Beside(tpot_s, gap_s, num_pictures, meter.read().others)
