"""Metrics of fetching: what becomes of URLs."""

from dataclasses import dataclass
from typing import Final, Self

from gateway.remote.refusals import Outcome
from shared.metrics import NO_METRICS, Counter, Registry


@dataclass(frozen=True, slots=True)
class FetchMetrics:
    """Counts of fetches that ended, and of what they brought."""

    fetches: Counter
    fetched_bytes: Counter

    @classmethod
    def declared(cls, registry: Registry) -> Self:
        """Declare the metrics."""
        return cls(
            fetches=registry.counter(
                "internvl_gateway_remote_fetches_total",
                "URLs of media that were asked for, by what became of them",
                outcome=tuple(outcome.value for outcome in Outcome),
            ),
            fetched_bytes=registry.counter(
                "internvl_gateway_remote_fetched_bytes_total", "Bytes of media that were fetched from URLs"
            ),
        )


UNCOUNTED: Final = FetchMetrics.declared(NO_METRICS)
