"""How fast steps have been, and so how much of a prompt the next one may read."""

from dataclasses import dataclass
from typing import Final

_LEAST_TOKENS: Final = 32  # fewer are hardly faster: the weights have to be read for one as for many
_SHARE: Final = 0.25  # of a new measurement in the mean
_PROMPTS_SHARE: Final = 0.5  # of a step's seconds at least: or many streams would leave prompts no time at all
_LEAST_SLOPE: Final = 0.25  # of what a token takes in all: whatever reading the weights takes, more tokens take longer


@dataclass(frozen=True, slots=True)
class StepLimits:
    """How large a step may be: in tokens, and in seconds while answers are being streamed and while none is."""

    max_tokens: int
    busy_s: float = 0.2
    idle_s: float = 1.0


class Pace:
    """Learns from steps what one takes at least, and how much longer with every token of a prompt.

    One thread only, but for `seconds_per_token`: what a token of a prompt takes in all, zero before anything is known.
    """

    def __init__(self, limits: StepLimits) -> None:
        self._limits = limits
        self._least_s = 0.0
        self.seconds_per_token = 0.0
        self._more_s = 0.0  # with every token

    def note(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step."""
        if num_tokens < _LEAST_TOKENS:
            self._least_s = _nearer(self._least_s, seconds)
            return
        in_all = seconds / num_tokens
        self.seconds_per_token = _nearer(self.seconds_per_token, in_all)
        more = max((seconds - self._least_s) / num_tokens, in_all * _LEAST_SLOPE)
        self._more_s = _nearer(self._more_s, more)

    def room(self, num_streams: int) -> int:
        """Return how many tokens of prompts a step may read beside the next tokens of so many streams."""
        limits = self._limits
        room = limits.max_tokens - num_streams
        if self._more_s:
            limit = limits.busy_s if num_streams else limits.idle_s
            seconds = max(limit - self._least_s, limit * _PROMPTS_SHARE)
            room = min(room, max(_LEAST_TOKENS, int(seconds / self._more_s) - num_streams))
        return room

    def seconds_for(self, num_tokens: int) -> float:
        """Return how long reading so much of prompts takes."""
        return num_tokens * self.seconds_per_token


def _nearer(mean: float, value: float) -> float:
    return mean + (value - mean) * _SHARE if mean else value
