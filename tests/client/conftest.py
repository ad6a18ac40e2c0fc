"""What the client's tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from internvl_client import Client
from tests.client.fake_gateway import FakeGateway, serving


@pytest.fixture
def gateway_class() -> type[FakeGateway]:
    """What a test runs against; a parametrization may say otherwise."""
    return FakeGateway


@pytest.fixture
def gateway(gateway_class: type[FakeGateway]) -> Iterator[FakeGateway]:
    with serving(gateway_class()) as gateway:
        yield gateway


@pytest.fixture
def client(gateway: FakeGateway) -> Iterator[Client]:
    with Client(gateway.address, timeout_s=20) as client:
        yield client


@pytest.fixture
def own_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs here, whatever runs on the machine."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("INTERNVL_ADDRESS", raising=False)
