"""Asks a target what a workload says, and keeps what became of every question."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from internvl_client.bench.exchange import Exchange, Stopwatch
from internvl_client.bench.questions import ORDINARY, Question, TextLength, questions_before, questions_of, text_of
from internvl_client.bench.target import Target, TargetError
from internvl_client.bench.workload import Workload

OnDone = Callable[[], object]
_WARM_UP: Final = (
    Workload("warm-up-picture", pictures=1, output_tokens=8),
    Workload("warm-up-text", dialogues=8, output_tokens=8),
)
_SHORT_WORDS, _LONG_WORDS = 16, 272


@dataclass(frozen=True, slots=True)
class Round:
    """A workload asked once: the exchanges of each dialogue, in the order of its turns, and how long all of it took."""

    dialogues: tuple[tuple[Exchange, ...], ...]
    wall_s: float

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """All of them, failed ones included."""
        return tuple(exchange for dialogue in self.dialogues for exchange in dialogue)


async def ask_round(
    workload: Workload,
    target: Target,
    *,
    seed: int,
    round_index: int = 0,
    length: TextLength = ORDINARY,
    on_done: OnDone = lambda: None,
) -> Round:
    """Ask one round and return how it went; `on_done` is called after every question.

    A question that fails ends its dialogue and no other; what it failed with stands in its exchange. What has to be
    asked before the round is asked here and not measured; raises `TargetError` when that fails.
    """
    for dialogue in questions_before(workload, seed, round_index, length):
        await _ask_unmeasured(target, dialogue)
    asked = questions_of(workload, seed, round_index, length)
    delays = _arrivals(workload, f"{seed}:{round_index}")
    limit = asyncio.Semaphore(workload.concurrency or len(asked))
    started = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        running = [
            tasks.create_task(_begin(delay, limit, target, dialogue, workload.output_tokens, on_done))
            for delay, dialogue in zip(delays, asked, strict=True)
        ]
    return Round(tuple(task.result() for task in running), time.perf_counter() - started)


async def warm_up(target: Target, seed: int, length: TextLength = ORDINARY) -> None:
    """Ask a few questions so that nothing is done for the first time when it is measured; raise `TargetError`."""
    for workload in _WARM_UP:
        for dialogue in questions_of(workload, seed, 0, length):
            await _ask_unmeasured(target, dialogue, workload.output_tokens)


async def calibrate(target: Target, seed: int) -> TextLength:
    """Return how long texts have to be, by what the target says of two of them; raise `TargetError`."""
    counts = []
    for num_words in (_SHORT_WORDS, _LONG_WORDS):
        question = Question(text_of(num_words, f"calibration:{seed}:{num_words}"))
        counts.append((await _ask_unmeasured(target, (question,))).num_prompt_tokens)
    short, long = counts
    if short is None or long is None or long <= short:
        return ORDINARY
    return TextLength((_LONG_WORDS - _SHORT_WORDS) / (long - short))


async def _ask_unmeasured(target: Target, dialogue: Sequence[Question], num_output_tokens: int = 4) -> Exchange:
    async with target.dialogue(1) as asked:
        return await asked.ask(dialogue[0], num_output_tokens)


async def _begin(
    delay_s: float,
    limit: asyncio.Semaphore,
    target: Target,
    questions: Sequence[Question],
    num_output_tokens: int,
    on_done: OnDone,
) -> tuple[Exchange, ...]:
    await asyncio.sleep(delay_s)
    async with limit:
        return await _asked(target, questions, num_output_tokens, on_done)


async def _asked(
    target: Target, questions: Sequence[Question], num_output_tokens: int, on_done: OnDone
) -> tuple[Exchange, ...]:
    exchanges: list[Exchange] = []
    watch = Stopwatch()
    try:
        async with target.dialogue(len(questions)) as dialogue:
            for question in questions:
                watch = Stopwatch()
                exchanges.append(await dialogue.ask(question, num_output_tokens))
                on_done()
    except TargetError as error:
        exchanges.append(watch.failed(str(error)))
        on_done()
    return tuple(exchanges)


def _arrivals(workload: Workload, seed: str) -> list[float]:
    """Return when each dialogue begins, in seconds: at once, or as independent callers would come."""
    if not workload.rate_per_s:
        return [0.0] * workload.dialogues
    gaps = random.Random(f"arrivals:{seed}")  # noqa: S311  nothing is secret here
    moments = [0.0]
    for _ in range(workload.dialogues - 1):
        moments.append(moments[-1] + gaps.expovariate(workload.rate_per_s))
    return moments
