"""Metrics of how replicas are chosen."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, Self, get_args

from gateway.routing.replica import State
from shared.metrics import NO_METRICS, Counter, Gauge, Registry

Stage = Literal["llm", "vision", "critic_llm", "critic_vision"]
Reason = Literal["affinity", "overflow", "only", "least_busy"]


@dataclass(frozen=True, slots=True)
class FleetMetrics:
    """What the gateway counts of its stages' replicas; `kind` is the stage."""

    picks: Counter
    ejections: Counter
    replicas: Gauge

    @classmethod
    def declared(cls, registry: Registry) -> Self:
        """Declare the metrics."""
        return cls(
            picks=registry.counter(
                "internvl_gateway_replica_picks_total",
                "Calls to a stage, by why they went where they did: the replica that knows the prompt, another because "
                "that one was busy or unwell, the only one there is, the least busy",
                kind=get_args(Stage),
                reason=get_args(Reason),
            ),
            ejections=registry.counter(
                "internvl_gateway_replica_ejections_total",
                "Times that a replica was left alone for a while because it had failed",
                kind=get_args(Stage),
            ),
            replicas=registry.gauge(
                "internvl_gateway_replicas",
                "Replicas of a stage: ready, left alone after a failure, slow to begin, away or not serving",
                kind=get_args(Stage),
                state=get_args(State),
            ),
        )

    def follow(self, stage: Stage, count: Callable[[State], int]) -> None:
        """Read how many replicas of a stage are in which state whenever somebody asks."""
        for state in get_args(State):
            self.replicas.follow(partial(count, state), kind=stage, state=state)


UNOBSERVED: Final = FleetMetrics.declared(NO_METRICS)
