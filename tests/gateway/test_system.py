"""The system as the gateway sees it, with replicas that answer as a test says."""

import asyncio
from collections.abc import Sequence

import pytest

from gateway.system import StageState, System
from shared.errors import DeadlineExceeded, InternalError, NotReady, ServiceError, VisionUnavailable
from shared.service_status import ModelStatus, ServiceStatus, StatusSource, StoreStatus

STATUS = ServiceStatus("1.0", 100.0, 1 << 20, 1 << 30)


class Replica:
    """Answers `status`, or raises `error`."""

    def __init__(self, status: ServiceStatus = STATUS, error: ServiceError | None = None) -> None:
        self._status, self._error = status, error

    async def status(self) -> ServiceStatus:
        if self._error:
            raise self._error
        return self._status


def system_of(**stages: Sequence[StatusSource]) -> System:
    return System(Replica(), {name: (lambda replicas=replicas: replicas) for name, replicas in stages.items()})


async def test_every_replica_says_how_it_is() -> None:
    other = ServiceStatus("1.0", 101.0, 2, 3, ModelStatus("InternVL3-1B", 896, 256, "float32", "cpu"))
    found = await system_of(vision=[Replica()], llm=[Replica(), Replica(other)]).status()
    assert found.gateway == STATUS
    assert [(stage.name, stage.status) for stage in found.stages] == [
        ("vision", STATUS),
        ("llm", STATUS),
        ("llm", other),
    ]
    assert {stage.state for stage in found.stages} == {StageState.READY}


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (NotReady("Starting."), StageState.NOT_READY),
        (VisionUnavailable("Away."), StageState.UNREACHABLE),
        (DeadlineExceeded("Late."), StageState.UNREACHABLE),
        (InternalError("No such call."), StageState.READY),
    ],
)
async def test_a_replica_that_does_not_say_how_it_is_still_has_a_state(error: ServiceError, state: StageState) -> None:
    found = await system_of(vision=[Replica(error=error)], llm=[Replica()]).status()
    assert [(stage.state, stage.status) for stage in found.stages] == [(state, None), (StageState.READY, STATUS)]


async def test_a_stage_without_replicas_is_unreachable() -> None:
    (stage,) = (await system_of(llm=[]).status()).stages
    assert (stage.name, stage.state) == ("llm", StageState.UNREACHABLE)


async def test_media_with_a_store_of_their_own_are_told_of() -> None:
    store = StoreStatus(is_reachable=False)

    async def media_store() -> StoreStatus:
        return store

    assert (await System(Replica(), {}, media_store).status()).media_store == store
    assert (await System(Replica(), {}).status()).media_store is None


async def test_all_are_asked_side_by_side() -> None:
    barrier = asyncio.Barrier(3)

    class Waiting(Replica):
        async def status(self) -> ServiceStatus:
            await barrier.wait()
            return STATUS

    found = await asyncio.wait_for(system_of(vision=[Waiting()], llm=[Waiting(), Waiting()]).status(), 20)
    assert len(found.stages) == 3
