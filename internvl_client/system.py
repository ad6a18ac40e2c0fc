"""What the system says of itself: the gateway, its store, and the replicas behind it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from internvl_client import convert
from internvl_serving.common.v1 import status_pb2
from internvl_serving.gateway.v1 import system_service_pb2


class StageState(StrEnum):
    """How a replica stands: it answers, is starting or shutting down, or cannot be reached by the gateway."""

    UNSPECIFIED = "UNSPECIFIED"
    READY = "READY"
    NOT_READY = "NOT_READY"
    UNREACHABLE = "UNREACHABLE"


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A checkpoint that is served: its directory's name, its widths, in what type and where it is computed."""

    name: str
    hidden_size: int
    tokens_per_tile: int
    data_type: str
    devices: str


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """A Redis or Valkey as a service sees it; `max_bytes` 0 is no limit. Of one that is away nothing more is known."""

    is_reachable: bool
    eviction_policy: str
    used_bytes: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """How a process is, when its clock said `time`. Memory is 0 where it cannot be told."""

    version: str
    time: datetime
    resident_bytes: int
    available_bytes: int
    model: ModelStatus | None = None
    store: StoreStatus | None = None


@dataclass(frozen=True, slots=True)
class StageStatus:
    """A replica of the stage `name`: "vision", "llm", "critic_vision" or "critic_llm".

    `status` is what it says of itself, where it says anything.
    """

    name: str
    state: StageState
    status: ServiceStatus | None = None


@dataclass(frozen=True, slots=True)
class SystemStatus:
    """The system as one gateway sees it. `media_store` keeps the bytes of media, where they have one of their own."""

    gateway: ServiceStatus
    stages: tuple[StageStatus, ...]
    media_store: StoreStatus | None = None


_STATES = {int(system_service_pb2.StageState.Value(f"STAGE_STATE_{state}")): state for state in StageState}


def system_of(response: system_service_pb2.GetStatusResponse) -> SystemStatus:
    """Return what the gateway has answered."""
    stages = tuple(
        StageStatus(
            stage.name,
            _STATES.get(stage.state, StageState.UNSPECIFIED),
            _service_of(stage.status) if stage.HasField("status") else None,
        )
        for stage in response.stages
    )
    media_store = _store_of(response.media_store) if response.HasField("media_store") else None
    return SystemStatus(_service_of(response.gateway), stages, media_store)


def _service_of(message: status_pb2.ServiceStatus) -> ServiceStatus:
    model = message.model
    return ServiceStatus(
        message.version,
        convert.time_of(message.time),
        message.resident_bytes,
        message.available_bytes,
        ModelStatus(model.name, model.hidden_size, model.tokens_per_tile, model.data_type, model.devices)
        if message.HasField("model")
        else None,
        _store_of(message.store) if message.HasField("store") else None,
    )


def _store_of(message: status_pb2.StoreStatus) -> StoreStatus:
    return StoreStatus(message.is_reachable, message.eviction_policy, message.used_bytes, message.max_bytes)
