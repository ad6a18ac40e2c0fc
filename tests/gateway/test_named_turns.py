"""Turns that a client has named: each is answered once, however often it is sent."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress

import pytest
from redis.asyncio import Redis

from gateway.content import MediaPart, Medium, Message, PreprocessOptions, Role, TextPart, ToolCall
from gateway.conversations import ConversationStore
from gateway.events import CandidateResult, ChatEvent, ChatRequest, Delta, Finished, FinishReason, Generated, Started
from gateway.kept_turn import Outcome, read_turn, write_turn
from shared.digest import digest_of
from shared.errors import (
    ConversationBusy,
    ConversationNotFound,
    InvalidRequest,
    LlmUnavailable,
    TurnIdReused,
)
from tests.gateway.fakes_gateway import (
    CAT,
    DOG,
    STARTED,
    Gateway,
    answer_of,
    ask,
    assistant,
    by_digest,
    gateway_on,
    inline,
    user,
)


@pytest.fixture
async def gateway(store_url: str) -> AsyncIterator[Gateway]:
    async with gateway_on(store_url) as made:
        yield made


async def begun(gateway: Gateway) -> str:
    return (await gateway.conversations.create(None)).conversation_id


async def messages_of(gateway: Gateway, conversation_id: str) -> tuple[Message, ...]:
    return (await gateway.conversations.list_messages(conversation_id, 0, "")).messages


def text_of(events: list[ChatEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


async def test_a_turn_that_is_sent_again_is_told_again(gateway: Gateway) -> None:
    request = ask(user(inline(CAT), "What?"), conversation_id=await begun(gateway), turn_id="t1")
    gateway.llm.scripts = [answer_of("A ", "cat.")]
    first = await gateway.answer(request)
    again = await gateway.answer(request)
    assert len(gateway.llm.requests) == 1
    assert len(await messages_of(gateway, request.conversation_id)) == 2
    assert [type(event) for event in again] == [Started, Delta, Finished]
    assert (again[0], text_of(again)) == (STARTED, "A cat.")
    told, ended = again[-1], first[-1]
    assert isinstance(told, Finished)
    assert isinstance(ended, Finished)
    assert (told.replayed, ended.replayed) == (True, False)
    assert (told.message_id, told.best.text) == (ended.message_id, "A cat.")
    assert (told.generated.usage, told.generated.finish_reason) == (ended.generated.usage, FinishReason.STOP)
    assert [receipt.media_digest for receipt in told.receipts] == [digest_of(CAT)]
    assert told.receipts[0].encoded.cache_tier is ended.receipts[0].encoded.cache_tier


async def test_another_gateway_tells_it_as_well(gateway: Gateway, store_url: str) -> None:
    request = ask(user("Hi"), conversation_id=await begun(gateway), turn_id="t1")
    await gateway.answer(request)
    async with gateway_on(store_url) as other:
        assert (await other.finished(request)).replayed
        assert other.llm.requests == []


async def test_a_turn_without_a_name_is_a_new_one_each_time(gateway: Gateway) -> None:
    request = ask(user("Hi"), conversation_id=await begun(gateway))
    await gateway.answer(request)
    assert not (await gateway.finished(request)).replayed
    assert len(await messages_of(gateway, request.conversation_id)) == 4


async def test_the_same_picture_sent_in_another_way_is_the_same_turn(gateway: Gateway) -> None:
    conversation_id = await begun(gateway)
    await gateway.answer(ask(user(inline(CAT), "What?"), conversation_id=conversation_id, turn_id="t1"))
    again = ask(user(by_digest(CAT), "What?"), conversation_id=conversation_id, turn_id="t1")
    assert (await gateway.finished(again)).replayed


@pytest.mark.parametrize(
    "other",
    [user(inline(CAT), "Why?"), user(inline(DOG), "What?"), user(inline(CAT, 3), "What?"), user("What?", inline(CAT))],
)
async def test_a_name_that_is_taken_is_refused_to_another_turn(gateway: Gateway, other: Message) -> None:
    conversation_id = await begun(gateway)
    await gateway.answer(ask(user(inline(CAT), "What?"), conversation_id=conversation_id, turn_id="t1"))
    with pytest.raises(TurnIdReused):
        await gateway.answer(ask(other, conversation_id=conversation_id, turn_id="t1"))
    assert len(await messages_of(gateway, conversation_id)) == 2
    assert not (await gateway.finished(ask(other, conversation_id=conversation_id, turn_id="t2"))).replayed


async def test_the_same_name_in_another_conversation_is_another_turn(gateway: Gateway) -> None:
    for _ in range(2):
        request = ask(user("Hi"), conversation_id=await begun(gateway), turn_id="t1")
        assert not (await gateway.finished(request)).replayed


async def test_an_earlier_turn_is_told_again_although_others_came_and_one_is_running(gateway: Gateway) -> None:
    conversation_id, gate = await begun(gateway), asyncio.Event()
    gateway.llm.scripts = [answer_of("One."), answer_of("Two."), [STARTED, gate, *answer_of("Three.")[1:]]]
    first = ask(user("1"), conversation_id=conversation_id, turn_id="t1")
    await gateway.answer(first)
    await gateway.answer(ask(user("2"), conversation_id=conversation_id, turn_id="t2"))
    running = asyncio.create_task(gateway.finished(ask(user("3"), conversation_id=conversation_id, turn_id="t3")))
    await gateway.llm.waiting.wait()
    assert text_of(await gateway.answer(first)) == "One."
    gate.set()
    assert (await running).message_id
    assert [message.text for message in await messages_of(gateway, conversation_id)][1::2] == ["One.", "Two.", "Three."]


async def test_a_turn_that_still_runs_is_waited_for_and_then_told(gateway: Gateway, store_url: str) -> None:
    gate = asyncio.Event()
    gateway.llm.scripts = [[STARTED, gate, *answer_of("Late.")[1:]]]
    request = ask(user("Hi"), conversation_id=await begun(gateway), turn_id="t1")
    first = asyncio.create_task(gateway.answer(request))
    await gateway.llm.waiting.wait()
    async with gateway_on(store_url) as other:
        second = asyncio.create_task(other.answer(request))
        await has_been_refused(other, request)
        gate.set()
        assert text_of(await first) == text_of(await second) == "Late."
        assert other.llm.requests == []


async def has_been_refused(gateway: Gateway, request: ChatRequest) -> None:
    """Return once somebody else's turn would be refused: `request`'s own is at work."""
    with pytest.raises(ConversationBusy) as caught:
        await gateway.answer(ask(user("Else"), conversation_id=request.conversation_id, turn_id="other"))
    assert caught.value.retry_after_s


async def test_a_turn_is_not_waited_for_for_ever(redis: Redis) -> None:
    store = ConversationStore(redis, ttl_s=3600, lease_s=0.4, max_text_chars=100)
    made = await store.create(None)
    async with store.lease(made.conversation_id, "t1"):
        with pytest.raises(ConversationBusy) as caught:
            async with store.lease(made.conversation_id, "t1"):
                pass
    assert caught.value.retry_after_s


async def test_a_turn_whose_gateway_has_died_is_taken_over(redis: Redis) -> None:
    store = ConversationStore(redis, ttl_s=3600, lease_s=0.6, max_text_chars=100)
    made = await store.create(None)
    key = f"ivl:conversation:{{{made.conversation_id}}}:lease"
    await redis.set(key, "dead/t1", px=600)  # nobody renews it
    async with store.lease(made.conversation_id, "t1") as lease:
        assert await lease.append(user("Q"), assistant("A"))


async def test_a_turn_that_failed_is_answered_anew_under_its_name(gateway: Gateway) -> None:
    request = ask(user("Hi"), conversation_id=await begun(gateway), turn_id="t1")
    gateway.llm.scripts = [[STARTED, Delta("Half"), LlmUnavailable("Lost.")], answer_of("Whole.")]
    with pytest.raises(LlmUnavailable):
        await gateway.answer(request)
    assert text_of(await gateway.answer(request)) == "Whole."
    assert len(await messages_of(gateway, request.conversation_id)) == 2


async def test_calls_of_tools_are_told_again_with_their_ids(gateway: Gateway) -> None:
    calls = (ToolCall("f", '{"x": 1}'),)
    result = CandidateResult(FinishReason.TOOL_CALLS, 3, tool_calls=calls)
    gateway.llm.scripts = [[STARTED, Generated(FinishReason.TOOL_CALLS, candidates=(result,))]]
    request = ask(user("Hi"), conversation_id=await begun(gateway), turn_id="t1")
    first, again = await gateway.finished(request), await gateway.finished(request)
    assert again.best.result.tool_calls == first.best.result.tool_calls
    assert again.best.result.tool_calls[0].tool_call_id
    results = ask(Message(Role.TOOL, (TextPart("1"),)), conversation_id=request.conversation_id, turn_id="t2")
    assert not (await gateway.finished(results)).replayed
    assert (await gateway.finished(results)).replayed


async def test_of_several_candidates_the_best_is_told_again(gateway: Gateway) -> None:
    results = tuple(CandidateResult(FinishReason.STOP, 1, mean_logprob=each) for each in (-2.0, -1.0))
    gateway.llm.scripts = [
        [STARTED, Delta("worse"), Delta("better", candidate_index=1), Generated(FinishReason.STOP, candidates=results)]
    ]
    request = ask(user("Hi"), conversation_id=await begun(gateway), turn_id="t1")
    assert (await gateway.finished(request)).best_index == 1
    told = await gateway.finished(request)
    assert ([candidate.text for candidate in told.candidates], told.best_index) == (["better"], 0)
    assert told.best.score == -1.0


@pytest.mark.parametrize("turn_id", ["a b", "é", "x" * 129, "a/b"])
async def test_a_name_that_cannot_be_is_refused(gateway: Gateway, turn_id: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await gateway.answer(ask(user("Hi"), conversation_id=await begun(gateway), turn_id=turn_id))
    assert caught.value.field == "turn_id"


@pytest.mark.parametrize(("field", "value"), [("turn_id", "t1"), ("keep_partial_answer", True)])
async def test_what_only_a_kept_conversation_has_is_refused_elsewhere(
    gateway: Gateway, field: str, value: str | bool
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await gateway.answer(ask(user("Hi"), **{field: value}))
    assert caught.value.field == field


# What is said before a turn breaks off.

LOST = LlmUnavailable("Lost.")


async def test_what_was_said_before_a_failure_is_kept_where_that_is_wanted(gateway: Gateway) -> None:
    conversation_id = await begun(gateway)
    gateway.llm.scripts = [[STARTED, Delta("Half an "), Delta("ans"), LOST]]
    with pytest.raises(LlmUnavailable):
        await gateway.answer(ask(user(inline(CAT)), conversation_id=conversation_id, keep_partial_answer=True))
    question, answer = await messages_of(gateway, conversation_id)
    assert (answer.text, answer.cut_off, question.cut_off) == ("Half an ans", True, False)
    await gateway.answer(ask(user("Go on."), conversation_id=conversation_id))
    assert [turn.segments for turn in gateway.llm.requests[1].prompt.turns][1][0].text == "Half an ans"  # type: ignore[union-attr]


async def test_what_was_said_before_the_caller_left_is_kept_where_that_is_wanted(gateway: Gateway) -> None:
    conversation_id = await begun(gateway)
    gateway.llm.scripts = [[STARTED, Delta("Half"), asyncio.Event()], answer_of("Wh", "ole")]
    request = ask(user("Hi"), conversation_id=conversation_id, keep_partial_answer=True)
    task = asyncio.create_task(gateway.answer(request))
    await gateway.llm.waiting.wait()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert [message.text for message in await messages_of(gateway, conversation_id)] == ["Hi", "Half"]
    async with aclosing(gateway.chat.answer(ask(user("Hm"), conversation_id=conversation_id))) as events:
        await anext(events)
    async with aclosing(gateway.chat.answer(request)) as events:
        assert [await anext(events), await anext(events)] == [STARTED, Delta("Hel")]
    assert [message.text for message in await messages_of(gateway, conversation_id)] == ["Hi", "Half", "Hi", "Hel"]


async def test_a_turn_that_said_nothing_leaves_no_trace_even_so(gateway: Gateway) -> None:
    conversation_id = await begun(gateway)
    gateway.llm.scripts = [[STARTED, Delta(""), LOST]]
    with pytest.raises(LlmUnavailable):
        await gateway.answer(ask(user("Hi"), conversation_id=conversation_id, keep_partial_answer=True))
    assert await messages_of(gateway, conversation_id) == ()


async def test_a_turn_that_was_cut_off_is_answered_anew_in_its_place(gateway: Gateway) -> None:
    request = ask(user("Hi"), conversation_id=await begun(gateway), turn_id="t1", keep_partial_answer=True)
    gateway.llm.scripts = [[STARTED, Delta("Half"), LOST], answer_of("Whole.")]
    with pytest.raises(LlmUnavailable):
        await gateway.answer(request)
    assert not (await gateway.finished(request)).replayed
    assert len(gateway.llm.requests[1].prompt.turns) == 1
    kept = await messages_of(gateway, request.conversation_id)
    assert [(message.text, message.cut_off) for message in kept] == [("Hi", False), ("Whole.", False)]
    assert (await gateway.finished(request)).replayed


async def test_a_turn_that_was_cut_off_stays_so_when_the_conversation_has_gone_on(gateway: Gateway) -> None:
    request = ask(user("Hi"), conversation_id=await begun(gateway), turn_id="t1", keep_partial_answer=True)
    gateway.llm.scripts = [[STARTED, Delta("Half"), LOST]]
    with pytest.raises(LlmUnavailable):
        await gateway.answer(request)
    await gateway.answer(ask(user("Else"), conversation_id=request.conversation_id))
    with pytest.raises(TurnIdReused):
        await gateway.answer(request)
    assert len(await messages_of(gateway, request.conversation_id)) == 4


# How turns are written down.


async def test_what_a_newer_gateway_wrote_of_a_turn_is_read_and_damage_is_refused(gateway: Gateway) -> None:
    request = ask(user(inline(CAT), "Hi"), conversation_id=await begun(gateway), turn_id="t1")
    await gateway.answer(request)
    key = f"ivl:conversation:{{{request.conversation_id}}}:turns"
    written = (await gateway.redis.hgetall(key))[b"t1"]
    newer = written.replace(b'"finished":{', b'"mood":"curious","finished":{"smell":1,').replace(
        b'"usage":{', b'"usage":{"x":2,'
    )
    assert newer.count(b"smell") == newer.count(b'"x":2') == 1
    await gateway.redis.hset(key, "t1", newer)
    assert (await gateway.finished(request)).replayed
    for damaged in (b"", b"{}", written[:-1], written.replace(b'"position":0', b'"position":1')):
        await gateway.redis.hset(key, "t1", damaged)
        with pytest.raises(ConversationNotFound):
            await gateway.answer(request)
    assert (await gateway.finished(ask(user("Hi"), conversation_id=request.conversation_id))).message_id


def test_no_handle_and_no_prompt_is_written_with_a_turn() -> None:
    medium = MediaPart((Medium("c" * 64, PreprocessOptions(4)),))
    messages = (user(medium, "Q"), assistant("A"))
    written = write_turn(0, 2, Outcome(Started("m", 3, (1, 2, 3))))
    assert "1,2,3" not in written
    read = read_turn(written.encode(), messages)
    assert (read.is_cut_off, read.is_last, read.messages) == (True, True, messages)


async def test_a_name_lasts_as_long_as_its_conversation_and_goes_with_it(gateway: Gateway, redis: Redis) -> None:
    made = await gateway.conversations.create(None, ttl_s=500)
    await gateway.answer(ask(user("Hi"), conversation_id=made.conversation_id, turn_id="t1"))
    assert 490 < await redis.ttl(f"ivl:conversation:{{{made.conversation_id}}}:turns") <= 500
    await gateway.conversations.delete(made.conversation_id)
    assert await redis.keys("ivl:*") == []
