"""Measures how late the event loop comes to what is due: what a call waits because another holds the loop."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, NoReturn

from shared.metrics import MOMENTS_S, Histogram, Registry

_EVERY_S: Final = 0.1


def declared_lag(registry: Registry) -> Histogram:
    """Declare the metric."""
    return registry.histogram(
        "internvl_event_loop_lag_seconds", "How late the event loop came to what was due, ten times a second", MOMENTS_S
    )


async def watch_loop_lag(
    lag: Histogram,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> NoReturn:
    """Sleep for short times until cancelled, and note by how many seconds each sleep was too long."""
    while True:
        due = clock() + _EVERY_S
        await sleep(_EVERY_S)
        lag.observe(max(0.0, clock() - due))
