"""Conversations that begin with what was said in another."""

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from gateway.caller import Caller
from gateway.content import Message, Role, TextPart, ToolCall
from gateway.forks import Forks
from shared.digest import digest_of
from shared.errors import ConversationNotFound, InvalidRequest, MessageNotFound
from tests.gateway.acting import acting_for
from tests.gateway.fakes_gateway import CAT, Gateway, answer_of, ask, gateway_on, inline, user


@pytest.fixture
async def gateway(store_url: str) -> AsyncIterator[Gateway]:
    async with gateway_on(store_url) as made:
        yield made


def forks(gateway: Gateway) -> Forks:
    return Forks(gateway.conversations, gateway.library)


async def told(gateway: Gateway, *answers: str) -> str:
    """A conversation with a picture in its first turn."""
    conversation_id = (await gateway.conversations.create("Be brief.", 2000)).conversation_id
    gateway.llm.scripts = [answer_of(answer) for answer in answers]
    for number, _ in enumerate(answers):
        parts = (inline(CAT), "Q0") if number == 0 else (f"Q{number}",)
        await gateway.answer(ask(user(*parts), conversation_id=conversation_id))
    return conversation_id


async def messages_of(gateway: Gateway, conversation_id: str) -> tuple[Message, ...]:
    return (await gateway.conversations.list_messages(conversation_id, 0, "")).messages


async def test_a_fork_has_the_messages_up_to_its_answer_and_goes_its_own_way(gateway: Gateway) -> None:
    conversation_id = await told(gateway, "A0", "A1", "A2")
    past = await messages_of(gateway, conversation_id)
    forked = await forks(gateway).fork(conversation_id, past[3].message_id, None)
    assert (forked.system_message, forked.message_count) == ("Be brief.", 4)
    assert await messages_of(gateway, forked.conversation_id) == past[:4]
    await gateway.answer(ask(user("Else?"), conversation_id=forked.conversation_id))
    assert [turn.role for turn in gateway.llm.requests[-1].prompt.turns] == [Role.USER, Role.ASSISTANT] * 2 + [
        Role.USER
    ]
    assert gateway.llm.requests[-1].prompt.system_message == "Be brief."
    assert len(await messages_of(gateway, forked.conversation_id)) == 6
    assert await messages_of(gateway, conversation_id) == past


async def test_without_a_place_everything_is_forked(gateway: Gateway) -> None:
    conversation_id = await told(gateway, "A0", "A1")
    forked = await forks(gateway).fork(conversation_id, "", None)
    assert await messages_of(gateway, forked.conversation_id) == await messages_of(gateway, conversation_id)
    empty = await gateway.conversations.create("Be brief.")
    assert (await forks(gateway).fork(empty.conversation_id, "", None)).message_count == 0


async def test_a_fork_outlives_what_it_comes_from_with_its_pictures(gateway: Gateway, redis: Redis) -> None:
    conversation_id = await told(gateway, "A0")
    media_key = f"ivl:media:{digest_of(CAT)}"
    await redis.expire(media_key, 30)
    forked = await forks(gateway).fork(conversation_id, "", 5000)
    assert await redis.ttl(media_key) > 3000
    assert 4990 <= await redis.ttl(f"ivl:conversation:{{{forked.conversation_id}}}") <= 5000
    await gateway.conversations.delete(conversation_id)
    finished = await gateway.finished(ask(user("And?"), conversation_id=forked.conversation_id))
    assert [receipt.media_digest for receipt in finished.receipts] == [digest_of(CAT)]


async def test_a_fork_is_kept_as_long_as_what_it_comes_from(gateway: Gateway, redis: Redis) -> None:
    forked = await forks(gateway).fork(await told(gateway, "A0"), "", None)
    assert 1990 <= await redis.ttl(f"ivl:conversation:{{{forked.conversation_id}}}") <= 2000


async def test_a_turn_that_is_running_is_no_part_of_a_fork(gateway: Gateway) -> None:
    conversation_id = await told(gateway, "A0")
    async with gateway.conversations.lease(conversation_id):
        forked = await forks(gateway).fork(conversation_id, "", None)
    assert forked.message_count == 2


async def test_turns_are_named_anew_in_a_fork(gateway: Gateway) -> None:
    conversation_id = await told(gateway)
    request = ask(user("Hi"), conversation_id=conversation_id, turn_id="t1")
    await gateway.answer(request)
    forked = await forks(gateway).fork(conversation_id, "", None)
    named = ask(user("Else"), conversation_id=forked.conversation_id, turn_id="t1")
    assert not (await gateway.finished(named)).replayed


async def test_a_fork_ends_with_an_answer_that_is_there(gateway: Gateway) -> None:
    conversation_id = await told(gateway, "A0", "A1")
    past = await messages_of(gateway, conversation_id)
    with pytest.raises(InvalidRequest) as refused:
        await forks(gateway).fork(conversation_id, past[2].message_id, None)
    assert refused.value.field == "message_id"
    with pytest.raises(MessageNotFound) as missing:
        await forks(gateway).fork(conversation_id, "nobody", None)
    assert missing.value.resource == "nobody"
    with pytest.raises(ConversationNotFound):
        await forks(gateway).fork("a" * 32, "", None)
    with pytest.raises(InvalidRequest) as caught:
        await forks(gateway).fork(conversation_id, "", 0)
    assert caught.value.field == "ttl"
    assert await gateway.redis.zcard("ivl:conversations") == 1


async def test_a_fork_at_a_call_of_a_tool_goes_on_with_its_result(gateway: Gateway) -> None:
    conversation_id = (await gateway.conversations.create(None)).conversation_id
    async with gateway.conversations.lease(conversation_id) as lease:
        call = Message(Role.ASSISTANT, (ToolCall("f", "{}", "call_1"),))
        answer_id = await lease.append(user("Q"), call)
    forked = await forks(gateway).fork(conversation_id, answer_id or "", None)
    result = Message(Role.TOOL, (TextPart("1"),))
    assert (await gateway.finished(ask(result, conversation_id=forked.conversation_id))).message_id


async def test_nobody_forks_another_tenant_s_conversation(gateway: Gateway) -> None:
    with acting_for(Caller("acme")):
        conversation_id = await told(gateway, "A0")
    with acting_for(Caller("other")), pytest.raises(ConversationNotFound):
        await forks(gateway).fork(conversation_id, "", None)
