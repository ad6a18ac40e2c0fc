"""Kept conversations over real channels: named turns, partial answers, lists and forks."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from internvl_serving.common.v1 import generation_pb2
from internvl_serving.gateway.v1 import content_pb2
from internvl_serving.gateway.v1 import conversation_service_pb2 as pb
from shared.digest import digest_of
from shared.errors import InvalidRequest, MessageNotFound, NotPermitted, PromptTooLong, ServiceError, TurnIdReused
from tests.rpc.scripted_stages import DOG, Client, chat_request, error_of, running, text_of

DROP = generation_pb2.CONTEXT_OVERFLOW_DROP_OLDEST_TURNS


@pytest.fixture
async def client(tmp_path: Path, redis_url: str) -> AsyncIterator[Client]:
    async with running(tmp_path, redis_url) as made:
        yield made


async def messages_of(client: Client, conversation_id: str) -> list[content_pb2.Message]:
    request = pb.ListMessagesRequest(conversation_id=conversation_id)
    return list((await client.conversations.ListMessages(request)).messages)


async def test_a_turn_that_is_sent_again_is_told_again(client: Client) -> None:
    conversation_id = await client.conversation()
    first = await client.ask(DOG, "What?", conversation_id=conversation_id, turn_id="t1")
    again = await client.ask(DOG, "What?", conversation_id=conversation_id, turn_id="t1")
    assert [event.WhichOneof("event") for event in again] == ["started", "delta", "finished"]
    assert text_of(again) == text_of(first) == "A cat."
    told, ended = again[-1].finished, first[-1].finished
    assert (told.replayed, ended.replayed) == (True, False)
    assert told.message_id == ended.message_id
    assert (told.usage, told.timings.queue_duration) == (ended.usage, ended.timings.queue_duration)
    assert list(told.receipts) == list(ended.receipts)
    assert len(client.llm.requests) == 1
    error = await error_of(client.ask("Else?", conversation_id=conversation_id, turn_id="t1"))
    assert (type(error), error.field) == (TurnIdReused, "turn_id")


async def test_a_client_that_leaves_keeps_what_it_has_heard_if_it_wants_to(client: Client) -> None:
    conversation_id = await client.conversation()
    client.llm.gate = asyncio.Event()
    call = client.chat.Chat(chat_request("Hi", conversation_id=conversation_id, turn_id="t1", keep_partial_answer=True))
    for _ in range(3):
        await call.read()
    call.cancel()
    await asyncio.wait_for(client.llm.cancelled.wait(), 5)
    client.llm.gate = None
    # Whoever sends the turn again waits until the first call has been put away.
    again = await client.ask("Hi", conversation_id=conversation_id, turn_id="t1", keep_partial_answer=True)
    assert not again[-1].finished.replayed
    assert [message.cut_off for message in await messages_of(client, conversation_id)] == [False, False]


async def test_a_partial_answer_is_marked(client: Client) -> None:
    conversation_id = await client.conversation()
    client.llm.late_error = PromptTooLong("Late.")
    await error_of(client.ask("Hi", conversation_id=conversation_id, keep_partial_answer=True))
    question, answer = await messages_of(client, conversation_id)
    assert (question.cut_off, answer.cut_off, answer.parts[0].text) == (False, True, "A cat.")


async def test_the_wish_to_shorten_a_dialogue_reaches_the_model(client: Client) -> None:
    await client.ask("Hi", context_overflow=DROP)
    await client.ask("Hi")
    assert [request.context_overflow for request in client.llm.requests] == [DROP, 0]
    assert (await error_of(client.ask("Hi", context_overflow=7))).field == "context_overflow"


async def test_conversations_are_listed_and_forked(client: Client) -> None:
    made = [await client.conversation(system_message=str(number)) for number in range(3)]
    events = await client.ask(DOG, "What?", conversation_id=made[0])
    fork = pb.ForkConversationRequest(conversation_id=made[0], message_id=events[-1].finished.message_id)
    forked = (await client.conversations.ForkConversation(fork)).conversation
    assert (forked.system_message, forked.message_count) == ("0", 2)
    assert await messages_of(client, forked.conversation_id) == await messages_of(client, made[0])
    first = await client.conversations.ListConversations(pb.ListConversationsRequest(page_size=3))
    assert [each.conversation_id for each in first.conversations] == [forked.conversation_id, made[0], made[2]]
    rest = pb.ListConversationsRequest(page_token=first.next_page_token)
    second = await client.conversations.ListConversations(rest)
    assert second.conversations[0].conversation_id == made[1]  # others' tests made more
    finished = (await client.ask("And?", conversation_id=forked.conversation_id))[-1].finished
    assert [receipt.media_digest for receipt in finished.receipts] == [digest_of(DOG)]


@pytest.mark.parametrize(
    ("fork", "kind", "field"),
    [
        ({"message_id": "nobody"}, MessageNotFound, None),
        ({"ttl": Duration(seconds=0)}, InvalidRequest, "ttl"),
        ({"conversation_id": "x"}, ServiceError, None),
    ],
)
async def test_a_fork_that_cannot_be_is_refused(
    client: Client, fork: dict[str, Any], kind: type[ServiceError], field: str | None
) -> None:
    asked = pb.ForkConversationRequest(**({"conversation_id": await client.conversation()} | fork))
    error = await error_of(client.conversations.ForkConversation(asked))
    assert isinstance(error, kind)
    assert error.field == field


async def test_where_anybody_may_call_nothing_is_listed(tmp_path: Path, redis_url: str) -> None:
    async with running(tmp_path, redis_url, allow_anyone=True) as client:
        await client.conversation()
        error = await error_of(client.conversations.ListConversations(pb.ListConversationsRequest()))
        assert isinstance(error, NotPermitted)
