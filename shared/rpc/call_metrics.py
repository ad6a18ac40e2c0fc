"""Metrics of the calls that a server answers, the same in every service."""

from dataclasses import dataclass
from typing import Self

from shared.metrics import CALLS_S, Counter, Gauge, Histogram, Registry


@dataclass(frozen=True, slots=True)
class CallMetrics:
    """What a server counts. Of every call, `started` and `finished` count one each, however it ends."""

    started: Counter
    finished: Counter
    duration: Histogram
    in_progress: Gauge

    @classmethod
    def declared(cls, registry: Registry) -> Self:
        """Declare the metrics. `rpc` is a service's short name and a method's: `LlmService/Generate`."""
        return cls(
            started=registry.counter("internvl_rpc_started_total", "Calls that arrived, refused ones included", rpc=()),
            finished=registry.counter(
                "internvl_rpc_finished_total", "Calls that ended, by gRPC status code", rpc=(), code=()
            ),
            duration=registry.histogram(
                "internvl_rpc_duration_seconds", "From a call's arrival to its end, streams included", CALLS_S, rpc=()
            ),
            in_progress=registry.gauge("internvl_rpc_in_progress", "Calls that arrived and have not ended", rpc=()),
        )

    def start(self, rpc: str) -> None:
        """Count a call in."""
        self.started.inc(rpc=rpc)
        self.in_progress.add(1, rpc=rpc)

    def finish(self, rpc: str, code: str, duration_s: float) -> None:
        """Count a call out."""
        self.finished.inc(rpc=rpc, code=code)
        self.duration.observe(duration_s, rpc=rpc)
        self.in_progress.add(-1, rpc=rpc)


def rpc_of(method: str) -> str:
    """Return the label of a method, which gRPC calls `/package.Service/Method`."""
    return method.rpartition(".")[2]
