"""Dialogues that are too long: what is left out of them, and what the client is told."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from gateway.content import Message, Role, TextPart, ToolCall
from gateway.dialogue import Dialogue, Limits, check_dialogue
from gateway.events import ContextOverflow, Delta, FinishReason, Generated, Started
from shared.digest import digest_of
from shared.errors import InvalidRequest, LlmUnavailable, MediaUnreadable, PromptTooLong
from tests.gateway.fakes_gateway import (
    CAT,
    DOG,
    OWL,
    Gateway,
    answer_of,
    ask,
    assistant,
    gateway_on,
    inline,
    user,
)

DROP = ContextOverflow.DROP_OLDEST_TURNS
TALK = tuple(side(f"{number}") for number in range(5) for side in (user, assistant))[:-1]


@pytest.fixture
async def gateway(store_url: str) -> AsyncIterator[Gateway]:
    async with gateway_on(store_url) as made:
        yield made


def begun_without(count: int) -> list[Started | Delta | Generated]:
    return [Started("fake", 7, (), count), Delta("Hm."), Generated(FinishReason.STOP)]


async def test_the_model_is_asked_to_leave_turns_out_only_where_that_is_wanted(gateway: Gateway) -> None:
    await gateway.answer(ask(*TALK))
    await gateway.answer(ask(*TALK, context_overflow=DROP))
    assert [request.context_overflow for request in gateway.llm.requests] == [ContextOverflow.UNSPECIFIED, DROP]


async def test_what_the_model_left_out_is_told_and_has_no_receipt(gateway: Gateway) -> None:
    gateway.llm.scripts = [begun_without(2)]
    talk = (user(inline(CAT)), assistant("A"), user(inline(DOG)), assistant("B"), user(inline(OWL)))
    events = await gateway.answer(ask(*talk, context_overflow=DROP))
    started, *_, finished = events
    assert isinstance(started, Started)
    assert started.dropped_turns == 2
    assert [receipt.media_digest for receipt in finished.receipts] == [digest_of(OWL)]  # type: ignore[union-attr]


async def test_a_kept_conversation_keeps_what_a_turn_left_out(gateway: Gateway) -> None:
    conversation_id = (await gateway.conversations.create(None)).conversation_id
    await gateway.answer(ask(user(inline(CAT), "1"), conversation_id=conversation_id))
    gateway.llm.scripts = [begun_without(1)]
    request = ask(user("2"), conversation_id=conversation_id, context_overflow=DROP, turn_id="t1")
    started = (await gateway.answer(request))[0]
    assert started == (await gateway.answer(request))[0] == Started("fake", 7, (), 1)
    assert (await gateway.conversations.get(conversation_id)).message_count == 4
    gateway.llm.scripts = [answer_of("All there.")]
    finished = await gateway.finished(ask(user("3"), conversation_id=conversation_id))
    assert len(gateway.llm.requests[-1].prompt.turns) == 5
    assert [receipt.media_digest for receipt in finished.receipts] == [digest_of(CAT)]


async def test_a_second_attempt_begins_where_the_first_left_off(gateway: Gateway) -> None:
    gateway.llm.scripts = [[Started("fake", 7, (), 2), LlmUnavailable("Lost.")], begun_without(0)]
    events = await gateway.answer(ask(*TALK, context_overflow=DROP))
    assert [event.dropped_turns for event in events if isinstance(event, Started)] == [2]
    assert [len(request.prompt.turns) for request in gateway.llm.requests] == [9, 5]


async def test_what_the_model_refuses_all_the_same_is_the_client_s_error(gateway: Gateway) -> None:
    gateway.llm.scripts = [[PromptTooLong("Too long.", field="messages")]]
    with pytest.raises(PromptTooLong):
        await gateway.answer(ask(*TALK, context_overflow=DROP))
    assert len(gateway.llm.requests) == 1


@pytest.mark.parametrize(
    ("limits", "left"), [(Limits(messages=5), 5), (Limits(messages=4), 3), (Limits(text_chars=9), 9), (Limits(), 9)]
)
async def test_a_dialogue_over_the_gateway_s_limits_is_shortened_where_that_is_wanted(
    store_url: str, limits: Limits, left: int
) -> None:
    async with gateway_on(store_url, begun_without(0), limits=limits) as gateway:
        started = (await gateway.answer(ask(*TALK, context_overflow=DROP)))[0]
        assert isinstance(started, Started)
        assert (len(gateway.llm.requests[0].prompt.turns), started.dropped_turns) == (left, (9 - left) // 2)
        if left < 9:
            with pytest.raises(InvalidRequest):
                await gateway.answer(ask(*TALK))


async def test_a_conversation_goes_on_past_the_number_of_media_that_a_dialogue_has(store_url: str) -> None:
    async with gateway_on(store_url, limits=Limits(media=2)) as gateway:
        conversation_id = (await gateway.conversations.create(None)).conversation_id
        for picture in (CAT, DOG, OWL):
            request = ask(user(inline(picture)), conversation_id=conversation_id, context_overflow=DROP)
            finished = await gateway.finished(request)
        assert [receipt.media_digest for receipt in finished.receipts] == [digest_of(DOG), digest_of(OWL)]
        with pytest.raises(InvalidRequest):
            await gateway.answer(ask(user("More?"), conversation_id=conversation_id))


async def test_what_is_wrong_with_a_shortened_request_is_said_of_its_own_places(store_url: str) -> None:
    async with gateway_on(store_url, limits=Limits(messages=3, parts_per_message=2)) as gateway:
        gateway.vision.errors = [MediaUnreadable("No picture.")]
        with pytest.raises(MediaUnreadable) as caught:
            await gateway.answer(ask(*TALK[:-1], user("x", inline(CAT)), context_overflow=DROP))
        assert caught.value.field == "messages[8].parts[1].media"
        for last, field in ((user("a", "b", "c"), "messages[8].parts"), (assistant("x"), "messages[8].role")):
            with pytest.raises(InvalidRequest) as refused:
                await gateway.answer(ask(*TALK[:-1], last, context_overflow=DROP))
            assert refused.value.field == field


def test_a_turn_goes_with_its_tools_and_the_last_one_stays() -> None:
    call, result = Message(Role.ASSISTANT, (ToolCall("f", "{}"),)), Message(Role.TOOL, (TextPart("r"),))
    kept = (user("1"), call, result, assistant("2"), user("3"), call)
    dialogue = Dialogue("S", kept, (result,))
    shortened = dialogue.without_oldest_turns(1)
    assert (shortened.system_message, shortened.kept, shortened.new) == ("S", kept[4:], (result,))
    assert (shortened.dropped_turns, shortened.dropped_new) == (1, 0)
    assert dialogue.without_oldest_turns(7) == shortened
    assert dialogue.within(Limits(messages=1)) == shortened
    check_dialogue(replace(shortened), Limits())
