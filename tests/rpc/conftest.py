"""A real Valkey for the tests of a file that need one."""

from collections.abc import Iterator

import pytest

from tests.gateway.fakes_gateway import valkey


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with valkey() as server:
        yield server.connection_url
