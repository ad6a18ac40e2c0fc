"""Which conversations a tenant is told of, and what tenants see of one another."""

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest
from redis.asyncio import Redis

from gateway.caller import Caller
from gateway.conversation_index import ConversationIndex
from gateway.conversations import ConversationStore
from gateway.eviction import warn_of_eviction
from shared.errors import ConversationNotFound, InvalidRequest, NotPermitted, StoreUnavailable
from tests.gateway.acting import acting_for
from tests.gateway.fakes_gateway import Gateway, ask, assistant, gateway_on, redis_of, user

ACME, OTHER = Caller("acme", "key-1"), Caller("other", "key-2")


@pytest.fixture
def store(redis: Redis) -> ConversationStore:
    return store_on(redis)


@pytest.fixture
async def gateway(store_url: str) -> AsyncIterator[Gateway]:
    async with gateway_on(store_url) as made:
        yield made


def store_on(redis: Redis, *, lists_for_anybody: bool = True) -> ConversationStore:
    return ConversationStore(redis, 3600, 15.0, 100, lists_for_anybody=lists_for_anybody)


async def begun(store: ConversationStore, count: int) -> list[str]:
    return [(await store.create(f"Number {number}.")).conversation_id for number in range(count)]


async def listed(store: ConversationStore, page_size: int = 1000) -> list[str]:
    found, token = [], ""
    while True:
        page = await store.list_conversations(page_size, token)
        found += [conversation.conversation_id for conversation in page.conversations]
        if not (token := page.next_page_token):
            return found


async def test_conversations_are_listed_newest_first_with_what_is_known_of_each(store: ConversationStore) -> None:
    made = await begun(store, 3)
    page = await store.list_conversations(0, "")
    assert [conversation.conversation_id for conversation in page.conversations] == made[::-1]
    assert [conversation.system_message for conversation in page.conversations] == [
        "Number 2.",
        "Number 1.",
        "Number 0.",
    ]
    assert page.next_page_token == ""


async def test_a_turn_brings_a_conversation_to_the_front(gateway: Gateway) -> None:
    made = await begun(gateway.conversations, 3)
    await gateway.answer(ask(user("Hi"), conversation_id=made[0]))
    assert await listed(gateway.conversations) == [made[0], made[2], made[1]]
    first = (await gateway.conversations.list_conversations(1, "")).conversations[0]
    assert first.message_count == 2


@pytest.mark.parametrize("page_size", [1, 2, 3, 7, 8])
async def test_pages_cover_all_conversations_once(store: ConversationStore, page_size: int) -> None:
    made = await begun(store, 7)
    assert await listed(store, page_size) == made[::-1]


async def test_pages_cover_conversations_of_the_very_same_moment(redis: Redis) -> None:
    index = ConversationIndex(redis, keep_s=60)
    names = {f"c{number}": number // 4 for number in range(13)}
    await redis.zadd("ivl:conversations", names)
    for size in range(1, 15):
        found: list[str] = []
        token = ""
        while True:
            page = await index.page(size, token)
            found += page.conversation_ids
            if not (token := page.next_page_token):
                break
        assert sorted(found) == sorted(names)
        assert all(names[before] >= names[after] for before, after in pairwise(found))


async def test_what_has_expired_or_was_deleted_is_not_listed_and_then_forgotten(
    store: ConversationStore, redis: Redis
) -> None:
    made = await begun(store, 4)
    await store.delete(made[1])
    await redis.delete(f"ivl:conversation:{{{made[2]}}}")  # as if it had expired
    assert await redis.zcard("ivl:conversations") == 3
    assert await listed(store, 2) == [made[3], made[0]]
    assert await redis.zcard("ivl:conversations") == 2


async def test_a_page_may_be_empty_and_not_the_last(store: ConversationStore, redis: Redis) -> None:
    made = await begun(store, 3)
    await redis.delete(f"ivl:conversation:{{{made[2]}}}")
    page = await store.list_conversations(1, "")
    assert (page.conversations, bool(page.next_page_token)) == ((), True)
    assert [
        each.conversation_id for each in (await store.list_conversations(5, page.next_page_token)).conversations
    ] == (made[1::-1])


async def test_a_damaged_conversation_hides_no_other(store: ConversationStore, redis: Redis) -> None:
    made = await begun(store, 3)
    await redis.hset(f"ivl:conversation:{{{made[1]}}}", "about", "nonsense")
    assert await listed(store) == [made[2], made[0]]


async def test_the_list_is_bounded_and_ends_when_nobody_uses_it(redis: Redis) -> None:
    index = ConversationIndex(redis, keep_s=60, most=5)
    for number in range(9):
        await index.note_use(f"c{number}")
    assert (await index.page(10, "")).conversation_ids == ("c8", "c7", "c6", "c5", "c4")
    assert 0 < await redis.ttl("ivl:conversations") <= 60


@pytest.mark.parametrize("token", ["x", "1", "1.2.3", "-1.0", "1.", "1.é", "9" * 17 + ".1"])
async def test_a_page_token_of_somebody_else_s_making_is_refused(store: ConversationStore, token: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await store.list_conversations(1, token)
    assert caught.value.field == "page_token"


@pytest.mark.parametrize("page_size", [-1, 1001])
async def test_a_page_size_that_cannot_be_is_refused(store: ConversationStore, page_size: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await store.list_conversations(page_size, "")
    assert caught.value.field == "page_size"


async def test_where_anybody_may_call_nothing_is_listed_but_for_tenants(redis: Redis) -> None:
    store = store_on(redis, lists_for_anybody=False)
    (mine,) = await begun(store, 1)
    with pytest.raises(NotPermitted):
        await store.list_conversations(0, "")
    assert (await store.get(mine)).conversation_id == mine
    with acting_for(ACME):
        assert await listed(store) == []


async def test_a_list_that_cannot_be_written_costs_no_conversation(store: ConversationStore, redis: Redis) -> None:
    await redis.set("ivl:conversations", "no sorted set")
    (made,) = await begun(store, 1)
    assert (await store.get(made)).conversation_id == made
    with pytest.raises(StoreUnavailable):
        await store.list_conversations(0, "")


# Tenants.


async def test_a_tenant_s_conversation_is_not_there_for_anybody_else(store: ConversationStore, redis: Redis) -> None:
    with acting_for(ACME):
        (mine,) = await begun(store, 1)
        async with store.lease(mine) as lease:
            await lease.append(user("Q"), assistant("A"))
    assert set(await redis.keys("*")) == {
        b"ivl:tenant:acme:conversation:{" + mine.encode() + b"}",
        b"ivl:tenant:acme:conversations",
    }
    for somebody in (OTHER, Caller()):
        with acting_for(somebody):
            for call in (store.get(mine), store.delete(mine), store.read(mine), store.list_messages(mine, 0, "")):
                with pytest.raises(ConversationNotFound):
                    await call
            with pytest.raises(ConversationNotFound):
                async with store.lease(mine):
                    pass
            assert await listed(store) == []
    with acting_for(ACME):
        assert await listed(store) == [mine]
        assert (await store.get(mine)).message_count == 2


async def test_a_tenant_s_turns_stay_its_own(gateway: Gateway) -> None:
    async def turn(caller: Caller, conversation_id: str) -> str:
        with acting_for(caller):
            return (await gateway.finished(ask(user("Hi"), conversation_id=conversation_id, turn_id="t1"))).message_id

    with acting_for(ACME):
        (mine,) = await begun(gateway.conversations, 1)
    assert await asyncio.create_task(turn(ACME, mine))
    with pytest.raises(ConversationNotFound):
        await asyncio.create_task(turn(OTHER, mine))
    assert len(gateway.llm.requests) == 1


async def test_without_tenants_the_keys_have_no_tenant_in_them(store: ConversationStore, redis: Redis) -> None:
    (made,) = await begun(store, 1)
    async with store.lease(made, "t1") as lease:
        await lease.append(user("Q"), assistant("A"))
        assert set(await redis.keys("*")) == {
            key.encode()
            for key in ("ivl:conversations", f"ivl:conversation:{{{made}}}", f"ivl:conversation:{{{made}}}:lease")
        }


# Eviction.


@pytest.mark.parametrize(
    ("policy", "memory", "warns"),
    [
        ("allkeys-lru", "64mb", True),
        ("volatile-lru", "64mb", True),
        ("noeviction", "64mb", False),
        ("allkeys-lru", "0", False),
    ],
)
async def test_a_store_that_may_forget_conversations_is_warned_of(
    redis: Redis, capsys: pytest.CaptureFixture[str], policy: str, memory: str, warns: bool
) -> None:
    before = await redis.config_get("maxmemory*")
    try:
        await redis.config_set("maxmemory-policy", policy)
        await redis.config_set("maxmemory", memory)
        await warn_of_eviction(redis)
    finally:
        for name in ("maxmemory", "maxmemory-policy"):
            await redis.config_set(name, before[name])
    assert ("conversations_may_be_evicted" in capsys.readouterr().out) == warns


async def test_a_store_that_is_away_is_not_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    await warn_of_eviction(redis_of("redis://127.0.0.1:1"))
    assert "conversations_may_be_evicted" not in capsys.readouterr().out
