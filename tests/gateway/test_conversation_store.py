"""Kept conversations over a real store."""

import asyncio
import json
from contextlib import suppress

import pytest
from redis.asyncio import Redis

from gateway.content import MediaPart, Medium, Message, PreprocessOptions, Role, ToolCall, VideoOptions
from gateway.conversations import ConversationStore
from shared.errors import ConversationBusy, ConversationNotFound, InvalidRequest, StoreUnavailable
from shared.reach import reaching_store
from tests.gateway.fakes_gateway import CAT, DOG, assistant, by_digest, redis_of, user


@pytest.fixture
def store(redis: Redis) -> ConversationStore:
    return conversations_on(redis)


def conversations_on(redis: Redis, lease_s: float = 15.0) -> ConversationStore:
    return ConversationStore(redis, ttl_s=3600, lease_s=lease_s, max_text_chars=100)


async def add_turn(store: ConversationStore, conversation_id: str, question: str = "Q", answer: str = "A") -> str:
    async with store.lease(conversation_id) as lease:
        return await lease.append(user(question), assistant(answer)) or ""


async def texts_of(store: ConversationStore, conversation_id: str) -> list[str]:
    page = await store.list_messages(conversation_id, 1000, "")
    return ["".join(part.text for part in message.parts) for message in page.messages]  # type: ignore[union-attr]


def key(conversation_id: str) -> str:
    return f"ivl:conversation:{{{conversation_id}}}"


async def test_a_new_conversation_is_empty_and_its_id_is_not_to_be_guessed(store: ConversationStore) -> None:
    made = [await store.create("Be brief."), await store.create("Be brief.")]
    assert made[0].conversation_id != made[1].conversation_id
    assert len(made[0].conversation_id) == 32
    found = await store.get(made[0].conversation_id)
    assert (found.system_message, found.message_count) == ("Be brief.", 0)
    assert found.create_time == made[0].create_time


@pytest.mark.parametrize("system_message", [None, "", "Be brief."])
async def test_no_system_message_and_an_empty_one_are_kept_apart(
    store: ConversationStore, system_message: str | None
) -> None:
    made = await store.create(system_message)
    assert (await store.get(made.conversation_id)).system_message == system_message
    async with store.lease(made.conversation_id) as lease:
        assert lease.system_message == system_message


async def test_a_conversation_outlives_the_process_that_made_it(store: ConversationStore, store_url: str) -> None:
    made = await store.create(None)
    media = MediaPart((Medium("a" * 64, PreprocessOptions(4, False)), *by_digest(DOG).media), grouped=True)
    question = user("Both of ", media, by_digest(CAT), "?")
    async with store.lease(made.conversation_id) as lease:
        answer_id = await lease.append(question, assistant(""))
    other = redis_of(store_url)
    async with conversations_on(other).lease(made.conversation_id) as lease:
        assert [message.parts for message in lease.messages] == [question.parts, assistant("").parts]
        assert lease.messages[1].message_id == answer_id
        assert lease.messages[0].create_time == lease.messages[1].create_time is not None
    await other.aclose()


async def test_a_renewal_at_the_same_moment_loses_no_turn(store: ConversationStore) -> None:
    for _ in range(50):
        made = await store.create(None)
        async with store.lease(made.conversation_id) as lease:
            *answer_ids, renewed = await asyncio.gather(
                lease.append(user("Q"), assistant("A")), lease.append(user("Q"), assistant("A")), lease.renew()
            )
            assert all(answer_ids)
            assert renewed


async def test_a_cancellation_that_redis_forgets_is_not_lost() -> None:
    async def use() -> None:
        with reaching_store(), suppress(asyncio.CancelledError):
            await asyncio.sleep(60)

    using = asyncio.create_task(use())
    await asyncio.sleep(0)
    using.cancel()
    with pytest.raises(asyncio.CancelledError):
        await using


async def test_videos_and_calls_of_tools_are_kept(store: ConversationStore) -> None:
    made = await store.create(None)
    options = [("a", VideoOptions()), ("b", VideoOptions(16, 1.5, None)), ("c", VideoOptions(1, None, 0))]
    clips = [MediaPart((Medium(digest * 64, PreprocessOptions(2, True, video)),)) for digest, video in options]
    question, call = user(*clips, "What?"), Message(Role.ASSISTANT, (ToolCall("f", '{"x": 1}', "call_1"),))
    async with store.lease(made.conversation_id) as lease:
        await lease.append(question, call)
    async with store.lease(made.conversation_id) as lease:
        answer_id = await lease.append(Message(Role.TOOL, user("1").parts), assistant("One."))
    page = await store.list_messages(made.conversation_id, 0, "")
    assert [message.parts for message in page.messages[:2]] == [question.parts, call.parts]
    assert [message.role for message in page.messages] == [Role.USER, Role.ASSISTANT, Role.TOOL, Role.ASSISTANT]
    assert page.messages[3].message_id == answer_id


async def test_stored_messages_hold_digests_and_no_bytes(store: ConversationStore, redis: Redis) -> None:
    made = await store.create(None)
    carried = MediaPart((Medium("c" * 64, content=CAT),))
    async with store.lease(made.conversation_id) as lease:
        await lease.append(user(carried), assistant("A cat."))
    raw = b"".join((await redis.hgetall(key(made.conversation_id))).values())
    assert CAT not in raw
    assert b"c" * 64 in raw


async def test_a_second_turn_at_the_same_time_is_refused(store: ConversationStore) -> None:
    made = await store.create(None)
    async with store.lease(made.conversation_id):
        with pytest.raises(ConversationBusy):
            async with store.lease(made.conversation_id):
                pass
    assert await add_turn(store, made.conversation_id)


async def test_a_lease_is_given_back_whatever_happens(store: ConversationStore) -> None:
    made = await store.create(None)
    with pytest.raises(ZeroDivisionError):
        async with store.lease(made.conversation_id):
            raise ZeroDivisionError
    assert await add_turn(store, made.conversation_id)


async def test_a_lease_is_given_back_by_a_task_that_is_cancelled(store: ConversationStore) -> None:
    made, inside = await store.create(None), asyncio.Event()

    async def hold() -> None:
        async with store.lease(made.conversation_id):
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(hold())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await add_turn(store, made.conversation_id)


async def test_a_lease_is_renewed_while_it_is_held(redis: Redis) -> None:
    store = conversations_on(redis, lease_s=1.5)
    made = await store.create(None)
    async with store.lease(made.conversation_id) as lease:
        await asyncio.sleep(2.0)
        with pytest.raises(ConversationBusy):
            async with store.lease(made.conversation_id):
                pass
        assert await lease.append(user("Q"), assistant("A"))


async def test_a_short_lived_conversation_outlasts_a_long_turn(redis: Redis) -> None:
    store = conversations_on(redis, lease_s=1.5)
    made = await store.create(None, ttl_s=1)
    async with store.lease(made.conversation_id) as lease:
        await asyncio.sleep(1.7)
        assert await lease.append(user("Q"), assistant("A"))
    assert await texts_of(store, made.conversation_id) == ["Q", "A"]


async def test_a_lost_lease_stores_nothing(store: ConversationStore, redis: Redis) -> None:
    made = await store.create(None)
    async with store.lease(made.conversation_id) as lease:
        await redis.delete(f"{key(made.conversation_id)}:lease")  # as if it had run out
        await add_turn(store, made.conversation_id, "theirs", "stays")
        assert await lease.append(user("ours"), assistant("goes")) is None
    assert await texts_of(store, made.conversation_id) == ["theirs", "stays"]


async def test_a_lease_that_somebody_else_took_over_is_not_released(store: ConversationStore, redis: Redis) -> None:
    made = await store.create(None)
    async with store.lease(made.conversation_id):
        await redis.set(f"{key(made.conversation_id)}:lease", "theirs")
    assert await redis.get(f"{key(made.conversation_id)}:lease") == b"theirs"


async def test_deleting_a_conversation_wins_over_a_turn_that_is_running(store: ConversationStore, redis: Redis) -> None:
    made = await store.create(None)
    async with store.lease(made.conversation_id) as lease:
        await store.delete(made.conversation_id)
        assert await lease.append(user("Q"), assistant("A")) is None
    assert await redis.keys("ivl:*") == []


async def test_a_turn_gives_a_conversation_its_whole_life_again(store: ConversationStore, redis: Redis) -> None:
    made = await store.create(None, ttl_s=1000)
    await redis.expire(key(made.conversation_id), 30)
    await add_turn(store, made.conversation_id)
    assert 990 <= await redis.ttl(key(made.conversation_id)) <= 1000
    found = await store.get(made.conversation_id)
    assert 990 <= (found.expire_time - made.create_time).total_seconds() <= 1010


async def test_an_expired_conversation_is_not_found(store: ConversationStore, redis: Redis) -> None:
    made = await store.create(None)
    await redis.pexpire(key(made.conversation_id), 1)
    await asyncio.sleep(0.05)
    with pytest.raises(ConversationNotFound):
        await store.get(made.conversation_id)


@pytest.mark.parametrize("ttl_s", [0, -1, 30 * 86_400 + 1])
async def test_a_life_outside_the_bounds_is_refused(store: ConversationStore, ttl_s: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await store.create(None, ttl_s)
    assert caught.value.field == "ttl"


async def test_a_system_message_over_the_limit_is_refused(store: ConversationStore) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await store.create("x" * 101)
    assert caught.value.field == "system_message"


@pytest.mark.parametrize("conversation_id", ["", "x", "a" * 32, "*" * 32, "a}:lease" * 4, "é" * 32])
async def test_an_unknown_conversation_is_not_found_and_leaves_no_key(
    store: ConversationStore, redis: Redis, conversation_id: str
) -> None:
    for call in (store.get(conversation_id), store.delete(conversation_id), add_turn(store, conversation_id)):
        with pytest.raises(ConversationNotFound):
            await call
    with pytest.raises(ConversationNotFound):
        await store.list_messages(conversation_id, 0, "")
    assert await redis.keys("*") == []


async def test_pages_cover_all_messages_in_order(store: ConversationStore) -> None:
    made = await store.create(None)
    for index in range(3):
        await add_turn(store, made.conversation_id, f"Q{index}", f"A{index}")
    pages, token = [], ""
    while not pages or token:
        page = await store.list_messages(made.conversation_id, 4, token)
        pages.append(len(page.messages))
        token = page.next_page_token
    assert pages == [4, 2]
    assert await texts_of(store, made.conversation_id) == ["Q0", "A0", "Q1", "A1", "Q2", "A2"]
    assert len((await store.list_messages(made.conversation_id, 0, "")).messages) == 6
    assert (await store.list_messages(made.conversation_id, 4, "6")).messages == ()


@pytest.mark.parametrize(("page_size", "page_token"), [(-1, ""), (1001, ""), (1, "x"), (1, "-1"), (1, "9" * 10)])
async def test_a_page_that_cannot_be_is_refused(store: ConversationStore, page_size: int, page_token: str) -> None:
    made = await store.create(None)
    with pytest.raises(InvalidRequest):
        await store.list_messages(made.conversation_id, page_size, page_token)


VALID = {"message_id": "x", "role": "user", "create_time": "2026-01-01T00:00:00Z", "parts": [{"text": "Q"}]}


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\xff",
        b"{",
        b"[]",
        json.dumps(VALID | {"role": "system"}).encode(),
        json.dumps(VALID | {"create_time": "yesterday"}).encode(),
        json.dumps(VALID | {"parts": [{"media": [{"digest": "../../etc"}]}]}).encode(),
    ],
)
async def test_a_damaged_message_makes_a_conversation_not_found(
    store: ConversationStore, redis: Redis, value: bytes
) -> None:
    made = await store.create(None)
    await add_turn(store, made.conversation_id)
    await redis.hset(key(made.conversation_id), "0", value)
    with pytest.raises(ConversationNotFound):
        await store.list_messages(made.conversation_id, 0, "")
    with pytest.raises(ConversationNotFound):
        await add_turn(store, made.conversation_id)
    assert await redis.get(f"{key(made.conversation_id)}:lease") is None


async def test_a_missing_message_makes_a_conversation_not_found(store: ConversationStore, redis: Redis) -> None:
    made = await store.create(None)
    await add_turn(store, made.conversation_id)
    await add_turn(store, made.conversation_id)
    await redis.hdel(key(made.conversation_id), "1")
    with pytest.raises(ConversationNotFound):
        await add_turn(store, made.conversation_id)


@pytest.mark.parametrize("about", [b"{}", b"nonsense", b'{"system_message": null, "ttl_s": 0}'])
async def test_damaged_facts_make_a_conversation_not_found(
    store: ConversationStore, redis: Redis, about: bytes
) -> None:
    made = await store.create(None)
    await redis.hset(key(made.conversation_id), "about", about)
    with pytest.raises(ConversationNotFound):
        await store.get(made.conversation_id)


async def test_what_a_newer_replica_adds_is_passed_over(store: ConversationStore, redis: Redis) -> None:
    made = await store.create(None)
    await add_turn(store, made.conversation_id)
    await redis.hset(key(made.conversation_id), "0", json.dumps(VALID | {"mood": "curious"}))
    assert await texts_of(store, made.conversation_id) == ["Q", "A"]


async def test_a_store_that_is_away_is_said_to_be() -> None:
    store = conversations_on(redis_of("redis://127.0.0.1:1"))
    for call in (store.create(None), store.get("a" * 32), store.delete("a" * 32), add_turn(store, "a" * 32)):
        with pytest.raises(StoreUnavailable):
            await call


async def test_a_key_of_another_kind_is_a_store_that_cannot_be_used(store: ConversationStore, redis: Redis) -> None:
    await redis.set(key("a" * 32), "no hash")
    with pytest.raises(StoreUnavailable):
        await store.get("a" * 32)
