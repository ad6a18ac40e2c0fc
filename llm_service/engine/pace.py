"""How fast steps have been, and so how much of a prompt the next one may read."""

from dataclasses import dataclass
from typing import Final

_LEAST_TOKENS: Final = 32  # fewer are hardly faster: the weights have to be read for one as for many
_SHARE: Final = 0.25  # of a new measurement in the mean


@dataclass(frozen=True, slots=True)
class StepLimits:
    """How large a step may be: in tokens, and in seconds while answers are being streamed and while none is."""

    max_tokens: int
    busy_s: float = 0.2
    idle_s: float = 0.5


class Pace:
    """Learns from the steps that read prompts how long a token takes. One thread only, but for `seconds_per_token`."""

    def __init__(self, limits: StepLimits) -> None:
        self._limits = limits
        self.seconds_per_token = 0.0  # nothing is known yet

    def note(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step. Steps of few tokens say nothing: they take what reading the weights takes."""
        if num_tokens >= _LEAST_TOKENS:
            now = seconds / num_tokens
            self.seconds_per_token += (now - self.seconds_per_token) * (_SHARE if self.seconds_per_token else 1.0)

    def room(self, num_streams: int) -> int:
        """Return how many tokens of prompts a step may read beside the next tokens of so many streams."""
        limits = self._limits
        room = limits.max_tokens - num_streams
        if self.seconds_per_token:
            seconds = limits.busy_s if num_streams else limits.idle_s
            room = min(room, max(_LEAST_TOKENS, int(seconds / self.seconds_per_token) - num_streams))
        return room

    def seconds_for(self, num_tokens: int) -> float:
        """Return how long reading so much of prompts takes; 0 where nothing is known."""
        return num_tokens * self.seconds_per_token
