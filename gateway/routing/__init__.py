"""Which replica of a stage is asked: who they are, how they are, and who of them knows most of a prompt already."""

from gateway.routing.affinity import affinity_of
from gateway.routing.fleet import Fleet, Visit
from gateway.routing.links import ReplicaLink, stage_fleet
from gateway.routing.metrics import FleetMetrics
from gateway.routing.replica import Replica, RoutingPolicy
from gateway.routing.targets import Endpoint, Targets

__all__ = [
    "Endpoint",
    "Fleet",
    "FleetMetrics",
    "Replica",
    "ReplicaLink",
    "RoutingPolicy",
    "Targets",
    "Visit",
    "affinity_of",
    "stage_fleet",
]
