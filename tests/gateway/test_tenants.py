"""What one tenant has, another neither finds nor ends nor learns of; over a real store."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from gateway.batch_store import BatchState, BatchStore
from gateway.batches import Batches, BatchLimits
from gateway.caller import ANYBODY, Caller, current_caller
from gateway.content import Medium
from gateway.dialogue import PlacedMedium
from gateway.encoder import MediaEncoder
from gateway.events import CacheTier, ChatRequest, GenerateRequest, GenerationConfig
from gateway.media import DELETED_CHANNEL, LocalMediaCache, MediaLibrary, RedisMediaStore
from gateway.prompt import Prompt
from gateway.stage_messages import encode_header, erase_request, generate_request
from shared.digest import digest_of
from shared.errors import BatchNotFound, MediaNotFound, StoreUnavailable, VisionUnavailable
from tests.gateway.acting import acting_for
from tests.gateway.fakes_gateway import CAT, DOG, FakeVision, MemoryMediaStore
from tests.gateway.test_batches import FakeChat, JsonFormat, questions, results_of, until

ACME, UMBRELLA = Caller("acme", "laptop"), Caller("umbrella", "server")
ISOLATED = Caller("alone", "key", is_isolated=True)
# A tenant that is called like what is kept, or like another's names put together, is a tenant like any other.
CALLERS = [ANYBODY, ACME, UMBRELLA, ISOLATED, Caller("media"), Caller("tenant"), Caller("batch"), Caller("acme.media")]
CAT_DIGEST = digest_of(CAT)


async def uploaded(library: MediaLibrary, content: bytes) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield content

    await library.upload(digest_of(content), chunks())


@pytest.fixture
def library(redis: Redis) -> MediaLibrary:
    return MediaLibrary(RedisMediaStore(redis, 60), LocalMediaCache(1 << 20), 1 << 20)


@pytest.mark.parametrize("owner", CALLERS, ids=str)
async def test_bytes_are_held_for_who_brought_them_only(library: MediaLibrary, owner: Caller) -> None:
    with acting_for(owner):
        await uploaded(library, CAT)
    for caller in CALLERS:
        with acting_for(caller):
            if caller == owner:
                assert await library.find_missing([CAT_DIGEST]) == []
                assert await library.content_of(Medium(CAT_DIGEST)) == CAT
                continue
            assert await library.find_missing([CAT_DIGEST]) == [CAT_DIGEST]
            # The bytes are in this process's memory, and in the store; both say the same to strangers.
            with pytest.raises(MediaNotFound) as known:
                await library.content_of(Medium(CAT_DIGEST))
            with pytest.raises(MediaNotFound) as unknown:
                await library.content_of(Medium(digest_of(DOG)))
            assert known.value.message == unknown.value.message


async def test_without_tenants_keys_are_what_they_have_always_been(library: MediaLibrary, redis: Redis) -> None:
    await uploaded(library, CAT)
    held = await BatchStore(redis, 15.0).create([b"a"], 1, 60, "call-1")
    names = {f"ivl:media:{CAT_DIGEST}", f"ivl:media:{CAT_DIGEST}:0"}
    names |= {f"ivl:batch:{{{held.batch_id}}}{ending}" for ending in ("", ":items", ":lease")}
    assert {name.decode() for name in await redis.keys("*")} == names


async def test_every_key_of_a_tenant_names_it(library: MediaLibrary, redis: Redis) -> None:
    with acting_for(ACME):
        await uploaded(library, CAT)
        await library.keep([Medium(digest_of(DOG), content=DOG)], 100)
        held = await BatchStore(redis, 15.0).create([b"a"], 1, 60, "call-1")
        await held.add_result(0, b"b", is_failure=False)
    keys = await redis.keys("*")
    assert len(keys) == 9
    assert all(name.startswith(b"ivl:tenant:acme:") for name in keys)


async def test_media_that_came_with_a_request_are_remembered_for_its_tenant_only(library: MediaLibrary) -> None:
    with acting_for(ACME):
        identified = await library.identify_medium(Medium("", content=CAT))
        assert await library.content_of(Medium(identified.digest)) == CAT
    with acting_for(UMBRELLA), pytest.raises(MediaNotFound):
        await library.content_of(Medium(identified.digest))


async def test_a_tenant_removes_its_own_bytes_and_nobody_else_s(library: MediaLibrary, redis: Redis) -> None:
    for caller in (ANYBODY, ACME, UMBRELLA):
        with acting_for(caller):
            await uploaded(library, CAT)
    async with redis.pubsub() as listener:
        await listener.subscribe(DELETED_CHANNEL)
        await listener.get_message(timeout=5)
        with acting_for(ACME):
            await library.delete(CAT_DIGEST)
            assert await library.find_missing([CAT_DIGEST]) == [CAT_DIGEST]
        with acting_for(ANYBODY):
            await library.delete(CAT_DIGEST)
        heard = [(await listener.get_message(timeout=5))["data"] for _ in range(2)]  # type: ignore[index]
    with acting_for(UMBRELLA):
        assert await library.content_of(Medium(CAT_DIGEST)) == CAT
    assert heard == [f"acme:{CAT_DIGEST}".encode(), CAT_DIGEST.encode()]


@pytest.mark.parametrize(("announced", "left"), [(f"acme:{CAT_DIGEST}", ANYBODY), (CAT_DIGEST, ACME)])
async def test_what_another_process_removes_is_forgotten_for_its_tenant_only(announced: str, left: Caller) -> None:
    library = MediaLibrary(MemoryMediaStore(), LocalMediaCache(1 << 20), 1 << 20)
    for caller in (ANYBODY, ACME):
        with acting_for(caller):
            await library.identify_medium(Medium("", content=CAT))
    library.hear_deleted(announced.encode())
    for caller in (ANYBODY, ACME):
        with acting_for(caller):
            if caller == left:
                assert await library.content_of(Medium(CAT_DIGEST)) == CAT
            else:
                # The store of this test knows no tenants and has nothing: what is left was in memory.
                with pytest.raises(MediaNotFound):
                    await library.content_of(Medium(CAT_DIGEST))


def placed(medium: Medium) -> PlacedMedium:
    return PlacedMedium(medium, "messages[0].parts[0].media")


async def test_a_digest_alone_shows_no_tenant_a_picture_it_never_had(library: MediaLibrary) -> None:
    vision = FakeVision([CAT])  # the embedding is there, made for somebody
    encoder = MediaEncoder(vision, library, parallel=8)
    with acting_for(UMBRELLA), pytest.raises(MediaNotFound):
        await encoder.encode([placed(Medium(CAT_DIGEST))])
    with acting_for(UMBRELLA), pytest.raises(MediaNotFound):
        await encoder.prefetch(placed(Medium(CAT_DIGEST)))
    assert vision.finds == []


@pytest.mark.parametrize("caller", [ANYBODY, ISOLATED], ids=str)
async def test_who_shares_with_nobody_is_asked_for_no_bytes(library: MediaLibrary, caller: Caller) -> None:
    encoder = MediaEncoder(FakeVision([CAT]), library, parallel=8)
    with acting_for(caller):
        (encoded,) = (await encoder.encode([placed(Medium(CAT_DIGEST))])).values()
    assert encoded.cache_tier is CacheTier.STORE


async def test_who_holds_the_bytes_uses_the_embedding_that_others_had_made(library: MediaLibrary) -> None:
    vision = FakeVision([CAT])
    encoder = MediaEncoder(vision, library, parallel=8)
    with acting_for(UMBRELLA):
        await uploaded(library, CAT)
        library.forget_all()  # as another gateway, that has not seen the upload
        (encoded,) = (await encoder.encode([placed(Medium(CAT_DIGEST))])).values()
    assert encoded.cache_tier is CacheTier.STORE
    assert vision.encodes == []


async def test_a_handle_from_earlier_is_its_tenant_s(library: MediaLibrary) -> None:
    vision = FakeVision()
    encoder = MediaEncoder(vision, library, parallel=8)
    for caller in (ACME, UMBRELLA):
        with acting_for(caller):
            await uploaded(library, CAT)
    with acting_for(ACME):
        await encoder.encode([placed(Medium(CAT_DIGEST))])
    vision.errors = [VisionUnavailable("Away.") for _ in range(4)]
    with acting_for(UMBRELLA), pytest.raises(VisionUnavailable):
        await encoder.encode([placed(Medium(CAT_DIGEST))])
    with acting_for(ACME):
        (encoded,) = (await encoder.encode([placed(Medium(CAT_DIGEST))])).values()
    assert encoded.cache_tier is CacheTier.LOCAL


async def test_while_the_store_is_away_a_tenant_goes_on_with_what_it_had_here() -> None:
    store = MemoryMediaStore()
    library = MediaLibrary(store, LocalMediaCache(0), 1 << 20)
    encoder = MediaEncoder(FakeVision([CAT]), library, parallel=8)
    store.contents[CAT_DIGEST] = CAT
    with acting_for(ACME):
        await encoder.encode([placed(Medium(CAT_DIGEST))])
    store.away = True
    with acting_for(ACME):
        await encoder.encode([placed(Medium(CAT_DIGEST))])
    with acting_for(UMBRELLA), pytest.raises(StoreUnavailable):
        await encoder.encode([placed(Medium(CAT_DIGEST))])


@pytest.mark.parametrize(("caller", "sent"), [(ANYBODY, ""), (ACME, ""), (ISOLATED, "alone")], ids=str)
def test_only_an_isolated_tenant_shares_nothing_in_the_stages(caller: Caller, sent: str) -> None:
    request = GenerateRequest(Prompt(None, ()), GenerationConfig())
    with acting_for(caller):
        assert encode_header(Medium(CAT_DIGEST), prefetch=False).tenant == sent
        assert erase_request(CAT_DIGEST).tenant == sent
        assert generate_request(request).prompt.tenant == sent


class NotingChat(FakeChat):
    """Notes for whom it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.callers: set[Caller] = set()

    async def answer(self, request: ChatRequest) -> Any:
        self.callers.add(current_caller())
        async for event in super().answer(request):
            yield event


Make = Callable[[NotingChat], Batches]


@pytest.fixture
async def make(redis: Redis, library: MediaLibrary) -> AsyncIterator[Make]:
    made: list[Batches] = []

    def new(chat: NotingChat) -> Batches:
        store = BatchStore(redis, 15.0)
        made.append(Batches(chat, library, store, JsonFormat(), BatchLimits(), 0.05, (0.0,)))
        return made[-1]

    yield new
    for batches in made:
        await batches.close()


@pytest.mark.parametrize("owner", [ANYBODY, ACME], ids=str)
async def test_a_batch_does_not_exist_for_others(make: Make, owner: Caller) -> None:
    chat = NotingChat()
    chat.hold = asyncio.Event()
    batches, elsewhere = make(chat), make(NotingChat())
    with acting_for(owner):
        batch = await batches.create(questions("a"))
    for stranger in {ANYBODY, ACME, UMBRELLA} - {owner}:
        for gateway in (batches, elsewhere):
            with acting_for(stranger):
                with pytest.raises(BatchNotFound):
                    await gateway.get(batch.batch_id)
                with pytest.raises(BatchNotFound):
                    await gateway.cancel(batch.batch_id)
                with pytest.raises(BatchNotFound):
                    await results_of(gateway, batch)
    chat.hold.set()
    with acting_for(owner):
        assert await results_of(batches, batch) == [(0, "A")]
        assert (await elsewhere.get(batch.batch_id)).state is BatchState.DONE


async def test_a_batch_is_worked_on_as_its_tenant(make: Make) -> None:
    chat = NotingChat()
    batches = make(chat)
    with acting_for(ACME):
        batch = await batches.create(questions("a", "b"))
    with acting_for(ACME):
        assert len(await results_of(batches, batch)) == 2
    assert chat.callers == {ACME}


async def test_a_batch_that_was_taken_over_is_worked_on_as_its_tenant(make: Make) -> None:
    first, second = NotingChat(), NotingChat()
    first.hold = asyncio.Event()
    stopping, other = make(first), make(second)
    with acting_for(ACME):
        batch = await stopping.create(questions("a", "b"))
        await until(lambda: first.running == 2)
    await stopping.close()
    with acting_for(ACME):
        assert len(await results_of(other, batch)) == 2
    assert second.callers == {ACME}
