"""Notices a part that has work and takes no steps."""

from dataclasses import dataclass
from typing import Final

CHECK_EVERY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a part has come at a moment: the steps that it has taken, and whether it has work for another."""

    num_steps: int
    has_work: bool


class Stall:
    """For how long a part has had work without taking a step.

    Counted in checks, not by the clock: a process that was frozen and goes on has not stalled meanwhile.
    """

    def __init__(self, period_s: float = CHECK_EVERY_S) -> None:
        self._period_s = period_s
        self._last: Progress | None = None
        self.seconds = 0.0

    def check(self, progress: Progress) -> float:
        """Return the seconds until now; has to be called once a period."""
        stands = progress.has_work and progress == self._last
        self.seconds = self.seconds + self._period_s if stands else 0.0
        self._last = progress
        return self.seconds
