"""The system as this gateway sees it: itself, its store, and the replicas of the stages behind it."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from shared.errors import DeadlineExceeded, NotReady, ServiceError, Unavailable
from shared.service_status import ServiceStatus, StatusSource, StoreStatus


class StageState(Enum):
    """How a replica stands."""

    READY = "READY"
    NOT_READY = "NOT_READY"
    UNREACHABLE = "UNREACHABLE"


@dataclass(frozen=True, slots=True)
class StageStatus:
    """One replica of a stage; `status` is what it says of itself, where it says anything."""

    name: str
    state: StageState
    status: ServiceStatus | None = None


@dataclass(frozen=True, slots=True)
class SystemStatus:
    """Everything. `media_store` keeps the bytes of media, where they have a store of their own."""

    gateway: ServiceStatus
    stages: tuple[StageStatus, ...]
    media_store: StoreStatus | None = None


class System:
    """Knows whom to ask. `stages` return the replicas of a stage that are known, at least none.

    A replica raises what it answers, and `Unavailable` or `DeadlineExceeded` where it does not.
    """

    def __init__(
        self,
        process: StatusSource,
        stages: Mapping[str, Callable[[], Sequence[StatusSource]]],
        media_store: Callable[[], Awaitable[StoreStatus]] | None = None,
    ) -> None:
        self._process = process
        self._stages = stages
        self._media_store = media_store

    async def status(self) -> SystemStatus:
        """Return how everything is; all are asked side by side."""
        asking = [_stage(name, source) for name, known in self._stages.items() for source in known() or (None,)]
        media_store = self._media_store or _no_store
        gateway, media, stages = await asyncio.gather(self._process.status(), media_store(), asyncio.gather(*asking))
        return SystemStatus(gateway, tuple(stages), media)


async def _no_store() -> None:
    return None


async def _stage(name: str, source: StatusSource | None) -> StageStatus:
    if source is None:
        return StageStatus(name, StageState.UNREACHABLE)
    try:
        return StageStatus(name, StageState.READY, await source.status())
    except NotReady:
        return StageStatus(name, StageState.NOT_READY)
    except (Unavailable, DeadlineExceeded):
        return StageStatus(name, StageState.UNREACHABLE)
    except ServiceError:  # it is there and knows no such call: an older release
        return StageStatus(name, StageState.READY)
