"""What waits between an answer and its reader: nothing while it reads, merged and bounded while it lags."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.events import Delta, FinishReason, Generated, GenerateEvent, Started, TokenLogprob
from gateway.outbox import MergedEvents, outbox
from shared.errors import LlmUnavailable

STARTED = Started("fake", 7)
END = Generated(FinishReason.STOP)


def token(index: int, text: str = "") -> Delta:
    return Delta(text or f"{index} ", (index,), 0, (TokenLogprob(index, b"t", -1.0),))


class Source:
    """An answer: says its events, an event that is an asyncio.Event is waited for, an error is raised."""

    def __init__(self, *steps: GenerateEvent | asyncio.Event | Exception) -> None:
        self.steps = steps
        self.said = 0
        self.tasks: set[Any] = set()
        self.waits_in: Any = None
        self.closed = False

    async def events(self) -> AsyncGenerator[GenerateEvent, None]:
        try:
            for step in self.steps:
                if isinstance(step, asyncio.Event):
                    self.waits_in = asyncio.current_task()
                    await step.wait()
                elif isinstance(step, Exception):
                    raise step
                else:
                    self.said += 1
                    self.tasks.add(asyncio.current_task())
                    yield step
        finally:
            self.closed = True


async def until(condition: Callable[[], bool]) -> None:
    """The loop goes on until something has come true; the test's own time limit is the only one."""
    while not condition():
        await asyncio.sleep(0.001)


def text_of(events: Sequence[GenerateEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


def ids_of(events: Sequence[GenerateEvent]) -> list[int]:
    return [number for event in events if isinstance(event, Delta) for number in event.token_ids]


async def test_a_reader_that_keeps_up_gets_every_event_as_it_is_and_no_task_stands_between() -> None:
    said = [STARTED, *map(token, range(100)), END]
    source = Source(*said)
    assert [event async for event in outbox(source.events(), lag_s=60.0)] == said
    assert source.tasks == {asyncio.current_task()}
    assert source.closed


async def test_an_answer_flows_on_while_its_reader_is_away() -> None:
    source = Source(STARTED, *map(token, range(50)), END)
    async with aclosing(outbox(source.events(), lag_s=0.001)) as events:
        assert await anext(events) == STARTED
        await until(lambda: source.closed)
        rest = [event async for event in events]
    assert rest == [
        Delta(
            "".join(f"{index} " for index in range(50)),
            tuple(range(50)),
            0,
            tuple(TokenLogprob(index, b"t", -1.0) for index in range(50)),
        ),
        END,
    ]


async def test_a_reader_that_has_caught_up_takes_the_events_itself_again() -> None:
    gates = [asyncio.Event(), asyncio.Event()]
    source = Source(STARTED, token(1), gates[0], token(2), gates[1], token(3), token(4), END)
    async with aclosing(outbox(source.events(), lag_s=0.001)) as events:
        await anext(events)
        await until(lambda: source.said == 2)  # by a task: the reader is away
        assert await anext(events) == token(1)
        waiting = asyncio.create_task(anext(events))
        await asyncio.sleep(0)
        gates[0].set()
        assert await waiting == token(2)
        source.tasks.clear()
        gates[1].set()
        assert [event async for event in events] == [token(3), token(4), END]
    assert source.tasks == {asyncio.current_task()}


async def test_no_more_waits_for_an_absent_reader_than_the_bound() -> None:
    source = Source(STARTED, *(token(index, "x" * 100) for index in range(1000)), END)
    async with aclosing(outbox(source.events(), lag_s=0.001, max_bytes=1000)) as events:
        await anext(events)
        await until(lambda: source.said > 5)
        for _ in range(100):
            await asyncio.sleep(0)
        assert source.said <= 1 + 1000 // 100
        rest = [event async for event in events]
    assert ids_of(rest) == list(range(1000))
    assert rest[-1] == END


async def test_an_error_comes_after_everything_that_was_said_before_it() -> None:
    source = Source(STARTED, token(1), token(2), LlmUnavailable("Lost."))
    async with aclosing(outbox(source.events(), lag_s=0.001)) as events:
        await anext(events)
        await until(lambda: source.closed)
        assert ids_of([await anext(events)]) == [1, 2]
        with pytest.raises(LlmUnavailable):
            await anext(events)


async def test_a_reader_that_waits_is_told_of_an_error_that_comes_then() -> None:
    gate = asyncio.Event()
    source = Source(STARTED, gate, LlmUnavailable("Lost."))
    async with aclosing(outbox(source.events(), lag_s=0.001)) as events:
        await anext(events)
        await until(lambda: source.waits_in is not None)
        waiting = asyncio.create_task(anext(events))
        await asyncio.sleep(0)
        gate.set()
        with pytest.raises(LlmUnavailable):
            await waiting


@pytest.mark.parametrize("is_away", [False, True])
async def test_closing_the_stream_closes_the_answer(is_away: bool) -> None:
    source = Source(STARTED, token(1), asyncio.Event())
    events = outbox(source.events(), lag_s=0.001 if is_away else 60.0)
    await anext(events)
    if is_away:
        await until(lambda: source.said == 2)
    await events.aclose()
    assert source.closed
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_what_is_taken_for_a_reader_is_taken_in_its_context() -> None:
    request_id: ContextVar[str] = ContextVar("request_id", default="nobody's")
    seen = []

    async def answer() -> AsyncGenerator[GenerateEvent, None]:
        for index in range(3):
            seen.append(request_id.get())
            yield token(index)

    request_id.set("mine")
    async with aclosing(outbox(answer(), lag_s=0.001)) as events:
        await anext(events)
        await until(lambda: len(seen) == 3)
    assert seen == ["mine"] * 3


DELTAS = st.builds(
    Delta,
    st.text(max_size=3),
    st.lists(st.integers(0, 9), max_size=2).map(tuple),
    st.integers(0, 2),
    st.lists(st.builds(TokenLogprob, st.integers(0, 9), st.just(b"t"), st.just(-1.0)), max_size=2).map(tuple),
)


@given(st.lists(st.one_of(DELTAS, st.none())))
def test_merging_loses_and_reorders_nothing_of_a_candidate(steps: list[Delta | None]) -> None:
    """A step is a delta that comes, or None: the reader takes what is there."""
    merged, said, read = MergedEvents(), [], []
    for step in steps:
        if step is not None:
            said.append(step)
            merged.put(step)
        elif merged:
            read.append(merged.take())
    while merged:
        read.append(merged.take())
    for candidate in range(3):
        before = [delta for delta in said if delta.candidate_index == candidate]
        after = [delta for delta in read if isinstance(delta, Delta) and delta.candidate_index == candidate]
        assert text_of(before) == text_of(after)
        assert ids_of(before) == ids_of(after)
        assert [each for delta in before for each in delta.logprobs] == [each for d in after for each in d.logprobs]
    assert merged.size_bytes == 0


def test_nothing_is_merged_across_the_beginning_or_the_end() -> None:
    merged = MergedEvents()
    for event in (token(1), STARTED, token(2), token(3), END):
        merged.put(event)
    read = []
    while merged:
        read.append(merged.take())
    assert [type(event) for event in read] == [Delta, Started, Delta, Generated]
    assert ids_of(read) == [1, 2, 3]
