"""What keeps failing is not called, until it answers again."""

import asyncio

from shared.breaker import CircuitBreaker, ProbedBreaker


def test_the_breaker_opens_after_failures_in_a_row_and_lets_one_probe_through_per_pause() -> None:
    now = 0.0
    changes: list[bool] = []
    breaker = CircuitBreaker(threshold=2, pause_s=1.0, clock=lambda: now, changed=changes.append)
    breaker.record(success=False)
    assert breaker.allow()
    breaker.record(success=False)
    assert breaker.is_open
    assert not breaker.allow()
    now = 1.0
    assert breaker.allow()
    assert not breaker.allow(), "only one probe"
    breaker.record(success=True)
    assert breaker.allow()
    assert changes == [True, False]


async def test_a_probed_breaker_is_closed_by_its_probe_and_by_no_call() -> None:
    there, probes = False, 0
    probed = asyncio.Event()

    async def ping() -> None:
        nonlocal probes
        probes += 1
        probed.set()
        if not there:
            raise OSError

    closed = asyncio.Event()
    breaker = ProbedBreaker(
        ping, (OSError,), threshold=1, every_s=0.001, changed=lambda is_open: None if is_open else closed.set()
    )
    task = asyncio.create_task(breaker.run())
    breaker.record(success=False)
    await probed.wait()
    assert not breaker.allow()
    there = True
    await closed.wait()
    assert breaker.allow()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert probes >= 2
