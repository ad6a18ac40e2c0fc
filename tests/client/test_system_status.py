"""What the system says of itself, as both clients give it."""

from datetime import UTC, datetime

import pytest

from internvl_client import AsyncClient, Client, ModelStatus, ServiceStatus, StageState, StageStatus, StoreStatus
from internvl_client.system import SystemStatus
from internvl_serving.common.v1 import status_pb2
from internvl_serving.gateway.v1 import system_service_pb2
from tests.client.fake_gateway import FakeGateway

TIME = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
EXPECTED = SystemStatus(
    ServiceStatus("1.0", TIME, 10, 20, None, StoreStatus(True, "noeviction", 3, 4)),
    (
        StageStatus(
            "vision",
            StageState.READY,
            ServiceStatus("1.0", TIME, 10, 20, ModelStatus("tiny", 64, 256, "float32", "cpu"), None),
        ),
        StageStatus("llm", StageState.UNREACHABLE),
        StageStatus("llm", StageState.UNSPECIFIED),
    ),
    StoreStatus(False, "", 0, 0),
)


@pytest.fixture(autouse=True)
def _status(gateway: FakeGateway) -> None:
    model = status_pb2.ModelStatus(name="tiny", hidden_size=64, tokens_per_tile=256, data_type="float32", devices="cpu")
    store = status_pb2.StoreStatus(is_reachable=True, eviction_policy="noeviction", used_bytes=3, max_bytes=4)
    told = status_pb2.ServiceStatus(version="1.0", resident_bytes=10, available_bytes=20)
    told.time.FromDatetime(TIME)
    gateway.status = system_service_pb2.GetStatusResponse(
        gateway=told,
        media_store=status_pb2.StoreStatus(),
        stages=[
            system_service_pb2.Stage(name="vision", state=system_service_pb2.STAGE_STATE_READY, status=told),
            system_service_pb2.Stage(name="llm", state=system_service_pb2.STAGE_STATE_UNREACHABLE),
            system_service_pb2.Stage(name="llm", state=99),  # type: ignore[arg-type]  # of a later release
        ],
    )
    gateway.status.gateway.store.CopyFrom(store)
    gateway.status.stages[0].status.model.CopyFrom(model)


def test_the_blocking_client_tells_it(client: Client) -> None:
    assert client.status() == EXPECTED


async def test_the_asyncio_client_tells_it(gateway: FakeGateway) -> None:
    async with AsyncClient(gateway.address, timeout_s=20) as client:
        assert await client.status() == EXPECTED
