"""Answers too many are refused at once; embeddings too many wait their turn."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_service.admission import Admission
from shared.errors import QueueFull


def test_an_answer_too_many_is_refused_with_a_retry_hint_and_admitted_later() -> None:
    admission = Admission(max_answers=1, max_bytes=10)
    with admission.answer():
        with pytest.raises(QueueFull) as refused, admission.answer():
            pass
        assert refused.value.retry_after_s is not None
    with admission.answer():
        pass


def test_answers_that_come_together_count_one_by_one_and_are_admitted_alone_whatever_their_number() -> None:
    admission = Admission(max_answers=4, max_bytes=10)
    with admission.answer(3):
        with pytest.raises(QueueFull), admission.answer(2):
            pass
        with admission.answer():
            pass
    with admission.answer(16), pytest.raises(QueueFull), admission.answer():
        pass
    with admission.answer(4):
        pass


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 15), max_size=20), cancelled=st.sets(st.integers(0, 19)))
async def test_never_more_than_the_budget_is_held_and_everybody_gets_their_turn(
    sizes: list[int], cancelled: set[int]
) -> None:
    admission = Admission(max_answers=100, max_bytes=10)
    held, served = 0, []

    async def hold(index: int, size: int) -> None:
        nonlocal held
        async with admission.embeddings(size):
            served.append(index)
            held += min(size, 10)
            try:
                assert held <= 10
                await asyncio.sleep(0)
            finally:
                held -= min(size, 10)

    tasks = [asyncio.create_task(hold(index, size)) for index, size in enumerate(sizes)]
    await asyncio.sleep(0)
    for index in cancelled & set(range(len(tasks))):
        tasks[index].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert not [result for result in results if isinstance(result, AssertionError)]
    assert set(range(len(sizes))) - cancelled <= set(served)
    async with asyncio.timeout(1), admission.embeddings(10):
        pass


async def test_embeddings_are_admitted_in_order_of_arrival() -> None:
    admission = Admission(max_answers=100, max_bytes=10)
    order: list[str] = []

    async def hold(name: str, size: int) -> None:
        async with admission.embeddings(size):
            order.append(name)
            await asyncio.sleep(0.001)

    tasks = [asyncio.create_task(hold(name, size)) for name, size in (("a", 8), ("large", 9), ("small", 1))]
    await asyncio.gather(*tasks)
    assert order == ["a", "large", "small"]
