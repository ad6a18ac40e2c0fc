"""One question and its answer, as whoever asked saw them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True, slots=True)
class Exchange:
    """Times in seconds since the question was sent: of every piece of the answer as it came, and of the end.

    A piece without text counts: a token has come, but no whole character yet, or white space that may be the last.

    Token counts are the server's own; None where it does not tell. `error` says why there is no answer.
    """

    piece_times_s: tuple[float, ...] = ()
    total_s: float = 0.0
    num_output_tokens: int = 0
    num_prompt_tokens: int | None = None
    num_cached_tokens: int | None = None
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Time to the first piece; of an answer without any, to its end."""
        return self.piece_times_s[0] if self.piece_times_s else self.total_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None where there is no other."""
        if len(self.piece_times_s) < 2 or self.num_output_tokens < 2:
            return None
        return (self.piece_times_s[-1] - self.piece_times_s[0]) / (self.num_output_tokens - 1)

    @property
    def longest_gap_s(self) -> float | None:
        """The longest wait between two pieces."""
        return max((after - before for before, after in pairwise(self.piece_times_s)), default=None)

    def to_json(self) -> dict[str, Any]:
        """Return the figures, without the time of every piece."""
        return {
            "ttft_s": self.ttft_s,
            "tpot_s": self.tpot_s,
            "longest_gap_s": self.longest_gap_s,
            "total_s": self.total_s,
            "prompt_tokens": self.num_prompt_tokens,
            "cached_tokens": self.num_cached_tokens,
            "output_tokens": self.num_output_tokens,
        } | ({"error": self.error} if self.error else {})


class Stopwatch:
    """Takes the times of one exchange. Starts when it is made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._pieces: list[float] = []

    def note_piece(self) -> None:
        """Note that a piece has come."""
        self._pieces.append(time.perf_counter() - self._started)

    def finished(
        self, num_output_tokens: int | None, num_prompt_tokens: int | None = None, num_cached_tokens: int | None = None
    ) -> Exchange:
        """Return the exchange, which ends now. A server that does not count its tokens sent one with each piece."""
        count = len(self._pieces) if num_output_tokens is None else num_output_tokens
        total_s = time.perf_counter() - self._started
        return Exchange(tuple(self._pieces), total_s, count, num_prompt_tokens, num_cached_tokens)

    def failed(self, error: str) -> Exchange:
        """Return the exchange of a question that got no answer, or not all of it."""
        return Exchange(tuple(self._pieces), time.perf_counter() - self._started, error=error)
