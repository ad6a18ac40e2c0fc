"""What rounds of exchanges come to: medians with their spread, rates, and how many questions failed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from internvl_client.bench.driver import Round
from internvl_client.bench.exchange import Exchange


@dataclass(frozen=True, slots=True)
class Spread:
    """A median, the least and the greatest value, and of how many values."""

    median: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Self | None:
        """Return the spread of the values that are there; None without any."""
        there = [value for value in values if value is not None]
        if not there:
            return None
        return cls(statistics.median(there), min(there), max(there), len(there))

    def text(self, scale: float = 1.0, digits: int = 2) -> str:
        """Return "median [least-most]", or the one value."""
        median = f"{self.median * scale:.{digits}f}"
        if self.count == 1:
            return median
        return f"{median} [{self.least * scale:.{digits}f}-{self.most * scale:.{digits}f}]"


@dataclass(frozen=True, slots=True)
class Summary:
    """Rounds of one workload. Times in seconds: `ttft_s` to the first text, `tpot_s` per output token after it.

    `gap_s` is the longest wait between two pieces of an answer's text. Rates are per round and count only what was
    answered. `turn_ttft_s` is by turn of a dialogue. `failures` are the different errors with their counts.
    """

    ttft_s: Spread | None
    tpot_s: Spread | None
    gap_s: Spread | None
    total_s: Spread | None
    requests_per_s: Spread | None
    output_tokens_per_s: Spread | None
    prompt_tokens: Spread | None
    cached_tokens: Spread | None
    output_tokens: Spread | None
    turn_ttft_s: tuple[Spread | None, ...]
    num_asked: int
    failures: dict[str, int]

    @classmethod
    def of(cls, rounds: Sequence[Round]) -> Self:
        """Sum up `rounds`, at least one."""
        asked = [exchange for one in rounds for exchange in one.exchanges]
        answered = [exchange for exchange in asked if not exchange.error]
        return cls(
            ttft_s=Spread.of(exchange.ttft_s for exchange in answered),
            tpot_s=Spread.of(exchange.tpot_s for exchange in answered),
            gap_s=Spread.of(exchange.longest_gap_s for exchange in answered),
            total_s=Spread.of(exchange.total_s for exchange in answered),
            requests_per_s=Spread.of(len(_answered(one)) / one.wall_s for one in rounds),
            output_tokens_per_s=Spread.of(
                sum(exchange.num_output_tokens for exchange in _answered(one)) / one.wall_s for one in rounds
            ),
            prompt_tokens=Spread.of(exchange.num_prompt_tokens for exchange in answered),
            cached_tokens=Spread.of(exchange.num_cached_tokens for exchange in answered),
            output_tokens=Spread.of(exchange.num_output_tokens for exchange in answered),
            turn_ttft_s=_by_turn(rounds),
            num_asked=len(asked),
            failures=_counted(exchange.error for exchange in asked if exchange.error),
        )

    @property
    def num_failed(self) -> int:
        """How many questions got no answer."""
        return sum(self.failures.values())

    def to_json(self) -> dict[str, Any]:
        """Return the figures by name."""
        return asdict(self)


def _answered(one: Round) -> list[Exchange]:
    return [exchange for exchange in one.exchanges if not exchange.error]


def _by_turn(rounds: Sequence[Round]) -> tuple[Spread | None, ...]:
    dialogues = [dialogue for one in rounds for dialogue in one.dialogues]
    num_turns = max((len(dialogue) for dialogue in dialogues), default=0)
    return tuple(
        Spread.of(dialogue[turn].ttft_s for dialogue in dialogues if turn < len(dialogue) and not dialogue[turn].error)
        for turn in range(num_turns)
    )


def _counted(errors: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for error in errors:
        counts[error] = counts.get(error, 0) + 1
    return counts
