"""What choosing a replica costs and brings: `python -m benchmarks.routing`.

Conversations of several turns come and go at replicas of which each remembers what it has read. For each way to choose:
how many later turns reach the replica that read the turn before, how much more than the mean the busiest replica has to
do, and what one choice takes. Time is simulated but for that last column. `--json FILE` writes the figures as well.
"""

import argparse
import asyncio
import heapq
import json
import logging
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import structlog

from gateway.routing import Endpoint, Fleet, Replica, RoutingPolicy
from shared.errors import LlmUnavailable

CONVERSATIONS: Final = 1_000
TURNS: Final = 6
ANSWER_S: Final = 2.0
THINKING_S: Final = 10.0
POPULAR: Final = 0.2  # share of conversations that begin with the same picture
WAYS: Final[dict[str, Callable[[int, bool], str]]] = {
    "by conversation": lambda number, is_popular: f"conversation {number}",
    "by first picture": lambda number, is_popular: "popular" if is_popular else f"picture {number}",
    "least busy": lambda number, is_popular: "",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one way of choosing came to, at so many replicas and calls in progress on average."""

    way: str
    replicas: int
    calls: int
    found_again: float
    busiest: float
    choice_us: float


class Idle:
    """A way to a replica that nobody goes."""

    stub = None

    async def watch(self, note: Callable[[bool], None]) -> None:
        """Say that it serves."""
        note(True)

    async def aclose(self) -> None:
        """Close nothing."""


class Listed:
    """So many replicas."""

    can_change = False

    def __init__(self, count: int) -> None:
        self._count = count

    async def resolve(self) -> list[Endpoint]:
        """Return them."""
        return [Endpoint(f"10.0.0.{number}:50052") for number in range(self._count)]


async def fleet_of(count: int, load_factor: float) -> Fleet:
    """Return a fleet of which all serve."""
    policy = RoutingPolicy(load_factor)
    fleet = Fleet("llm", Listed(count), lambda endpoint: Idle(), LlmUnavailable, policy, clock=lambda: 0.0)
    await fleet.update()
    await asyncio.sleep(0)
    return fleet


def simulated(fleet: Fleet, way: str, calls: int, seed: int = 7) -> Outcome:
    """Play all conversations; they begin so fast that about `calls` are in progress."""
    chance, key_of = random.Random(seed), WAYS[way]  # noqa: S311  a simulation
    pause_s = TURNS * ANSWER_S / calls
    popular = [chance.random() < POPULAR for _ in range(CONVERSATIONS)]
    # When, what kind (an answer's end before a question of the same time), which conversation, which turn.
    events = [(number * pause_s, 1, number, 0) for number in range(CONVERSATIONS)]
    heapq.heapify(events)
    read_by: dict[int, Replica] = {}
    busy: dict[int, Replica] = {}
    found, busiest, choices_s = 0, [], []
    while events:
        now, is_question, number, turn = heapq.heappop(events)
        if not is_question:
            busy.pop(number).end(number)
            continue
        started = time.perf_counter()
        replica = fleet.choose(key_of(number, popular[number]))
        choices_s.append(time.perf_counter() - started)
        replica.begin(number)
        busy[number] = replica
        found += read_by.get(number) is replica
        read_by[number] = replica
        loads = [each.calls for each in fleet.replicas]
        busiest.append(max(loads) * len(loads) / sum(loads))
        ends = now + chance.expovariate(1 / ANSWER_S)
        heapq.heappush(events, (ends, 0, number, turn))
        if turn + 1 < TURNS:
            heapq.heappush(events, (ends + chance.expovariate(1 / THINKING_S), 1, number, turn + 1))
    middle = busiest[len(busiest) // 4 : -len(busiest) // 4]
    later_turns = CONVERSATIONS * (TURNS - 1)
    return Outcome(
        way,
        len(fleet.replicas),
        calls,
        found / later_turns,
        statistics.fmean(middle),
        1e6 * statistics.median(choices_s),
    )


async def measured(load_factor: float) -> list[Outcome]:
    """Return the outcome of every way at fleets of several sizes."""
    return [
        simulated(await fleet_of(count, load_factor), way, calls)
        for count in (2, 8, 32)
        for calls in (4 * count, 32 * count)
        for way in WAYS
    ]


def main() -> None:
    """Measure, show and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--load-factor", type=float, default=RoutingPolicy().load_factor, help="as of the gateway")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    outcomes = asyncio.run(measured(arguments.load_factor))
    print(f"{'chosen':<18}{'replicas':>9}{'calls':>7}{'found again':>13}{'busiest/mean':>14}{'us a choice':>13}")
    for outcome in outcomes:
        print(
            f"{outcome.way:<18}{outcome.replicas:>9}{outcome.calls:>7}{outcome.found_again:>12.1%}"
            f"{outcome.busiest:>14.2f}{outcome.choice_us:>13.1f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")


if __name__ == "__main__":
    main()
