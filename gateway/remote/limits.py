"""How large, how slow and how many fetches may be."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Bounds of one fetch, and of all that run at once.

    `timeout_s` is for everything from the look-up on; `stall_s` for one piece of the body; after `grace_s` the body has
    to have come at `min_bytes_per_s` on average. `parallel` fetches run, `waiting` more wait for one of them to end.
    """

    max_bytes: int = 32 << 20
    timeout_s: float = 20.0
    connect_timeout_s: float = 3.0
    stall_s: float = 5.0
    grace_s: float = 3.0
    min_bytes_per_s: int = 16 << 10
    parallel: int = 8
    waiting: int = 64

    def is_too_slow(self, received_bytes: int, elapsed_s: float) -> bool:
        """Whether a body of which so much has come in so long is not worth waiting for."""
        return elapsed_s > self.grace_s and received_bytes < self.min_bytes_per_s * elapsed_s
