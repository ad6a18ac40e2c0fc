"""What the client's tests share."""

from collections.abc import Iterator

import pytest

from internvl_client import Client
from tests.client.fake_gateway import FakeGateway, serving


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with serving(FakeGateway()) as gateway:
        yield gateway


@pytest.fixture
def client(gateway: FakeGateway) -> Iterator[Client]:
    with Client(gateway.address, timeout_s=20) as client:
        yield client
