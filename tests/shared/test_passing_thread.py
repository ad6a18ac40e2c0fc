"""A passing thread does its work, tells what became of it, and is gone."""

import threading
from contextvars import ContextVar

import pytest

from shared.passing_thread import in_passing_thread

asked_by: ContextVar[str] = ContextVar("asked_by")


async def test_the_thread_ends_with_its_work() -> None:
    thread = await in_passing_thread(threading.current_thread)
    assert thread is not threading.current_thread()
    thread.join(5)
    assert not thread.is_alive()


async def test_what_is_raised_is_raised_and_the_thread_ends() -> None:
    threads = []

    def fail() -> None:
        threads.append(threading.current_thread())
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await in_passing_thread(fail)
    threads[0].join(5)
    assert not threads[0].is_alive()


async def test_the_caller_s_context_is_there_and_arguments_are_passed_on() -> None:
    asked_by.set("me")
    found = await in_passing_thread(lambda first, *, second: (asked_by.get(), first, second), 1, second=2)
    assert found == ("me", 1, 2)
