"""Deadline and request id follow a call, and work that several calls share keeps only the id."""

import asyncio

import pytest

from shared.errors import DeadlineExceeded
from shared.rpc.deadline import adopt, detached, outgoing, remaining_s, request_id


async def facts() -> tuple[float | None, str, float | None]:
    return remaining_s(), request_id(), outgoing()["timeout"]


async def test_detached_work_keeps_the_request_id_and_has_no_deadline() -> None:
    adopt(5.0, "abc-1")
    assert await asyncio.create_task(facts(), context=detached()) == (None, "abc-1", None)
    remaining, identity, timeout = await asyncio.create_task(facts())
    assert identity == "abc-1"
    assert remaining is not None
    assert timeout is not None
    assert 0 < timeout < remaining + 0.02 <= 5.02, "the call itself keeps its deadline"


async def test_work_detached_from_a_call_that_is_over_still_goes_on() -> None:
    adopt(0.0, "abc-2")
    with pytest.raises(DeadlineExceeded):
        outgoing()
    assert await asyncio.create_task(facts(), context=detached()) == (None, "abc-2", None)
