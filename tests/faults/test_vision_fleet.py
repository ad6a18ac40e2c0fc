"""Three vision replicas over one Valkey, as processes: a picture is encoded once, even when a replica is killed."""

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from io import BytesIO
from pathlib import Path

import grpc
import pytest
from PIL import Image

from deploy.local.service import Service
from deploy.local.valkey import LocalValkey
from internvl_serving.vision.v1.vision_service_pb2 import EncodeHeader, EncodeRequest, EncodeResponse
from internvl_serving.vision.v1.vision_service_pb2_grpc import VisionServiceStub
from shared.digest import digest_of
from shared.rpc.channel import open_channel

pytestmark = pytest.mark.e2e
TINY = Path(__file__).parents[1] / "golden/checkpoints/internvl3-8b-tiny"
LEASE_S = 2.0
_AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND)


class Replica:
    """One vision service and what it says that it has encoded."""

    def __init__(self, service: Service) -> None:
        self.service = service

    @property
    def encoded(self) -> list[str]:
        """Digests of the embeddings it has made, in order."""
        lines = (json.loads(line) for line in self.service.process.last_lines(100_000) if line.startswith("{"))
        return [line["digest"] for line in lines if line.get("event") == "picture_encoded"]

    def send(self, number: signal.Signals) -> None:
        # The leash is the parent of the service itself, and of its workers: all of them are meant.
        os.killpg(self.service.process.pid, number)


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[list[Replica]]:
    with ExitStack() as stack:
        valkey = LocalValkey(tmp_path)
        stack.callback(valkey.process.kill)
        environment = {"VISION_REDIS_URL": valkey.url(0), "VISION_EMBEDDING_KEY": "secret"}
        flags = ["--model", str(TINY), "--log-format", "json", "--encoding-lease-s", str(LEASE_S), "--threads", "1"]
        started = []
        for number in range(3):
            service = Service(f"vision-{number}", "vision_service", flags, environment, tmp_path)
            stack.callback(service.process.kill)
            started.append(Replica(service))
        deadline = time.monotonic() + 120
        while not all(replica.service.is_ready() for replica in started):
            assert time.monotonic() < deadline, started[0].service.process.last_lines(20)
            time.sleep(0.1)
        yield started


@asynccontextmanager
async def stubs_of(replicas: list[Replica]) -> AsyncIterator[list[VisionServiceStub]]:
    async with AsyncExitStack() as stack:
        addresses = [str(replica.service.address) for replica in replicas]
        channels = [await stack.enter_async_context(open_channel(address, 8 << 20)) for address in addresses]
        yield [VisionServiceStub(channel) for channel in channels]


async def encode(stubs: list[VisionServiceStub], first: int, content: bytes) -> EncodeResponse:
    """Ask one replica, header first, and the next one when it is lost: what a gateway does."""
    header = EncodeRequest(header=EncodeHeader(media_digest=digest_of(content)))
    for attempt in range(10):
        stub = stubs[(first + attempt) % len(stubs)]
        for messages in ([header], [header, EncodeRequest(chunk=content)]):
            try:
                response: EncodeResponse = await stub.Encode(iter(messages), timeout=60)
                return response
            except grpc.aio.AioRpcError as error:
                if error.code() not in _AGAIN:
                    raise
    raise AssertionError("no replica answered")


def pictures(count: int) -> list[bytes]:
    drawn = []
    for number in range(count):
        buffer = BytesIO()
        Image.effect_noise((900, 600), 50).convert("RGB").point(lambda level, n=number: (level + n) % 256).save(
            buffer, "PNG"
        )
        drawn.append(buffer.getvalue())
    return drawn


async def test_a_hundred_requests_encode_each_picture_once_though_a_replica_is_killed(replicas: list[Replica]) -> None:
    shown = pictures(20)
    async with stubs_of(replicas) as stubs:
        calls = [asyncio.create_task(encode(stubs, number, shown[number % 20])) for number in range(100)]
        while sum(len(replica.encoded) for replica in replicas) < 6:
            await asyncio.sleep(0.02)
        victim = replicas[1]
        victim.send(signal.SIGKILL)
        answers = await asyncio.gather(*calls)
    digests = [answer.handle.digest for answer in answers]
    assert len(set(digests)) == 20
    counts = Counter(digest for replica in replicas for digest in replica.encoded)
    assert set(counts) == set(digests)
    # What the dead one had made and not stored yet may be made once more, and nothing else.
    twice = {digest for digest, count in counts.items() if count > 1}
    assert twice <= set(victim.encoded)
    assert max(counts.values()) <= 2


async def test_a_frozen_replica_costs_the_others_one_lease(replicas: list[Replica]) -> None:
    (content,) = pictures(1)
    frozen, *others = replicas
    async with stubs_of(replicas) as stubs:
        call = asyncio.create_task(encode(stubs, 0, content))
        await asyncio.sleep(0.05)
        frozen.send(signal.SIGSTOP)
        async with stubs_of(others) as awake:
            answer = await asyncio.wait_for(encode(awake, 0, content), LEASE_S + 20)
        frozen.send(signal.SIGCONT)
        assert (await call).handle.digest == answer.handle.digest
    assert sum(len(replica.encoded) for replica in replicas) <= 2
