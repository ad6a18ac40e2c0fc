"""What the outbox between an answer and its reader costs: `python -m benchmarks.outbox`.

Nanoseconds an event for a reader that keeps up: without an outbox, with it, and with the plain alternative, a task that
puts every event into a queue. `--json FILE` writes the figures as well.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Final

from gateway.events import Delta, GenerateEvent
from gateway.outbox import outbox

ROUNDS: Final = 15
EVENTS: Final = 20_000
Events = AsyncGenerator[GenerateEvent, None]


async def answer() -> Events:
    """Say many words, each after the event loop has been round once, as if it had come over a wire."""
    delta = Delta("word ", (1,))
    for _ in range(EVENTS):
        await asyncio.sleep(0)
        yield delta


async def queued(events: Events) -> Events:
    """Stream the events through a queue that a task fills."""
    queue: asyncio.Queue[GenerateEvent | None] = asyncio.Queue()

    async def fill() -> None:
        async for event in events:
            queue.put_nowait(event)
        queue.put_nowait(None)

    filling = asyncio.create_task(fill())
    while event := await queue.get():
        yield event
    await filling


WAYS: Final[dict[str, Callable[[Events], Events]]] = {
    "without": lambda events: events,
    "outbox": outbox,
    "queue": queued,
}


async def nanoseconds_each(way: Callable[[Events], Events]) -> float:
    """Return how long one event takes to be read."""
    started = time.perf_counter_ns()
    async with aclosing(way(answer())) as events:
        async for _ in events:
            pass
    return (time.perf_counter_ns() - started) / EVENTS


def main() -> None:
    """Measure, show and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outbox", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(ROUNDS):
        for name, way in WAYS.items():
            found[name].append(asyncio.run(nanoseconds_each(way)))
    print(f"{'ns an event':<14}{'median':>8}{'least':>8}{'most':>8}")
    for name, times in found.items():
        print(f"{name:<14}{statistics.median(times):>8.0f}{min(times):>8.0f}{max(times):>8.0f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
