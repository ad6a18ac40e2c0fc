"""Turns whose stream was lost, and the other ways of kept conversations, against a scripted gateway."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from internvl_client import (
    AsyncClient,
    Client,
    ContextOverflow,
    ConversationInfo,
    Delta,
    Finished,
    Image,
    Message,
    Role,
    Started,
    UnavailableError,
)
from internvl_client.convert import message_of
from internvl_client.resumption import Resumption
from internvl_client.types import FinishReason, Timings, Usage
from internvl_serving.common.v1 import generation_pb2
from internvl_serving.gateway.v1 import chat_service_pb2, content_pb2
from tests.client.fake_gateway import FakeGateway, Responses, answer_of, candidates_of, refuse

LARGE = Image.from_bytes(os.urandom(300 << 10))


def lost_after(count: int, *pieces: str, then: Callable[[], Responses], **more: Any) -> Callable[..., Responses]:
    """Loses the first stream after `count` events of an answer of `pieces`; the second one is `then`."""
    calls = iter(range(10))

    def answer(request: chat_service_pb2.ChatRequest, context: grpc.ServicerContext) -> Responses:
        if next(calls):
            yield from then()
        else:
            yield from list(answer_of(*pieces, **more))[:count]
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    return answer


def replayed(*pieces: str) -> Responses:
    for response in answer_of(*pieces):
        if response.HasField("finished"):
            response.finished.replayed = True
        yield response


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "second", [("It is a cat.",), ("It ", "is a", " cat."), ("I", "t is a cat."), ("It is ", "a cat.")]
)
def test_a_lost_stream_goes_on_where_it_was(
    gateway: FakeGateway, client: Client, count: int, second: tuple[str, ...]
) -> None:
    gateway.answer = lost_after(count, "It ", "is a cat.", then=lambda: replayed(*second))
    with client.create_conversation().stream("What?") as stream:
        assert "".join(map(str, stream)) == "It is a cat."
        answer = stream.answer()
    assert (answer.text, answer.replayed) == ("It is a cat.", True)
    first, again = gateway.chats
    assert first == again
    assert first.turn_id
    assert gateway.metadata[0]["x-request-id"] == gateway.metadata[1]["x-request-id"]


async def test_the_asyncio_client_goes_on_as_well(gateway: FakeGateway) -> None:
    gateway.answer = lost_after(2, "It ", "is a cat.", then=lambda: answer_of("It is", " a cat."))
    async with AsyncClient(gateway.address, timeout_s=20) as client:
        conversation = await client.create_conversation()
        events = [event async for event in conversation.chat(["What?"])]
    assert [type(event) for event in events] == [Started, Delta, Delta, Delta, Finished]
    assert [str(event) for event in events[1:-1]] == ["It ", "is", " a cat."]


@pytest.mark.parametrize(
    "then",
    [lambda: answer_of("It was a dog."), lambda: answer_of("I"), lambda: candidates_of("It is", "a cat")],
    ids=["other words", "fewer words", "candidates"],
)
def test_what_cannot_be_gone_on_with_is_the_error_of_the_first_stream(
    gateway: FakeGateway, client: Client, then: Callable[[], Responses]
) -> None:
    gateway.answer = lost_after(3, "It ", "is", then=then)
    with client.create_conversation().stream("What?") as stream:
        assert [next(stream).text, next(stream).text] == ["It ", "is"]
        with pytest.raises(UnavailableError) as caught:
            list(stream)
    assert caught.value.reason == ""
    assert len(gateway.chats) == 2


def test_a_turn_is_sent_again_once_only(gateway: FakeGateway, client: Client) -> None:
    def always_lost(request: Any, context: grpc.ServicerContext) -> Responses:
        yield from list(answer_of("It "))[:2]
        context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    gateway.answer = always_lost
    with pytest.raises(UnavailableError):
        client.create_conversation().ask("What?")
    assert len(gateway.chats) == 2


def test_what_the_server_says_itself_is_no_lost_stream(gateway: FakeGateway, client: Client) -> None:
    def breaks_off(request: Any, context: grpc.ServicerContext) -> Responses:
        yield from list(answer_of("Half"))[:2]
        refuse(context, grpc.StatusCode.UNAVAILABLE, "LLM_UNAVAILABLE")

    gateway.answer = breaks_off
    with pytest.raises(UnavailableError):
        client.create_conversation().ask("What?")
    assert len(gateway.chats) == 1


def test_an_answer_that_is_not_kept_is_not_asked_for_again(gateway: FakeGateway, client: Client) -> None:
    gateway.answer = lost_after(2, "It ", then=lambda: answer_of("It is a cat."))
    with pytest.raises(UnavailableError):
        client.ask("What?")
    assert len(gateway.chats) == 1
    assert gateway.chats[0].turn_id == ""


@pytest.mark.parametrize("count", [1, 2])
def test_ids_that_were_delivered_already_cannot_be_gone_on_with(
    gateway: FakeGateway, client: Client, count: int
) -> None:
    gateway.answer = lost_after(count, "It ", then=lambda: answer_of("It ", token_ids=True), token_ids=True)
    with client.create_conversation().stream("What?", return_token_ids=True) as stream:
        if count == 1:
            assert stream.answer().token_ids == (0,)
        else:
            with pytest.raises(UnavailableError):
                stream.answer()


def test_a_picture_that_was_lost_meanwhile_is_uploaded_for_the_second_stream(
    gateway: FakeGateway, client: Client
) -> None:
    gateway.answer = lost_after(2, "It ", then=lambda: answer_of("It is a cat."))
    with client.create_conversation().stream(LARGE, "What?") as stream:
        assert str(next(stream)) == "It "
        gateway.media.clear()
        assert stream.answer().text == "It is a cat."
    assert len(gateway.uploads) == 2


def test_everything_that_a_turn_can_ask_for_is_sent(gateway: FakeGateway, client: Client) -> None:
    conversation = client.create_conversation()
    drop = ContextOverflow.DROP_OLDEST_TURNS
    conversation.ask("Hi", turn_id="mine", keep_partial_answer=True, context_overflow=drop)
    conversation.ask("Hi")
    client.ask("Hi", context_overflow=drop)
    mine, drawn, alone = gateway.chats
    assert (mine.turn_id, mine.keep_partial_answer) == ("mine", True)
    assert mine.context_overflow == alone.context_overflow == generation_pb2.CONTEXT_OVERFLOW_DROP_OLDEST_TURNS
    assert (len(drawn.turn_id), drawn.keep_partial_answer, drawn.context_overflow) == (32, False, 0)


def test_what_was_left_out_of_the_prompt_is_told(gateway: FakeGateway, client: Client) -> None:
    def shortened(request: Any, context: Any) -> Iterator[chat_service_pb2.ChatResponse]:
        for response in answer_of("Hm."):
            if response.HasField("started"):
                response.started.dropped_turn_count = 3
            yield response

    gateway.answer = shortened
    answer = client.ask("Hi")
    assert (answer.num_dropped_turns, answer.replayed) == (3, False)


def test_conversations_are_listed_page_by_page(gateway: FakeGateway, client: Client) -> None:
    made = [client.create_conversation(system_message=str(number)).conversation_id for number in range(5)]
    listed = list(client.conversations(page_size=2))
    assert [type(each) for each in listed] == [ConversationInfo] * 5
    assert [each.conversation_id for each in listed] == made[::-1]
    assert listed[0].system_message == "4"


async def test_the_asyncio_client_lists_and_forks_as_well(gateway: FakeGateway) -> None:
    async with AsyncClient(gateway.address, timeout_s=20) as client:
        conversation = await client.create_conversation()
        await conversation.ask(LARGE, "Hi")
        forked = await conversation.fork("m1", ttl_s=60)
        assert [each.conversation_id async for each in client.conversations(page_size=1)] == ["c1", "c0"]
        assert (await forked.ask("And?")).text == "It is a cat."
    assert (gateway.forks[0].message_id, gateway.forks[0].ttl.seconds) == ("m1", 60)
    assert gateway.chats[-1].conversation_id == forked.conversation_id


def test_a_conversation_is_forked_at_an_answer(gateway: FakeGateway, client: Client) -> None:
    conversation = client.create_conversation()
    for at in (None, "m1", Message(Role.ASSISTANT, ("A",), "m2")):
        assert conversation.fork(at).conversation_id.startswith("c")
    assert [(fork.message_id, fork.HasField("ttl")) for fork in gateway.forks] == [
        ("", False),
        ("m1", False),
        ("m2", False),
    ]
    for unkept in (conversation.ask("Hi"), Message.assistant("A")):
        with pytest.raises(ValueError, match="message_id"):
            conversation.fork(unkept)


def test_a_fork_remembers_the_pictures_of_what_it_comes_from(gateway: FakeGateway, client: Client) -> None:
    conversation = client.create_conversation()
    conversation.ask(LARGE, "Hi")
    forked = conversation.fork()
    gateway.media.clear()
    calls = iter(range(2))

    def needs_the_picture(request: Any, context: grpc.ServicerContext) -> Any:
        if next(calls) == 0:
            refuse(context, grpc.StatusCode.NOT_FOUND, "MEDIA_NOT_FOUND")
        return answer_of("Yes.")

    gateway.answer = needs_the_picture
    assert forked.ask("And?").text == "Yes."
    assert LARGE.digest in gateway.media


def test_an_answer_that_was_cut_off_says_so() -> None:
    kept = content_pb2.Message(role=generation_pb2.ROLE_ASSISTANT, parts=[content_pb2.Part(text="Ha")], cut_off=True)
    assert message_of(kept).cut_off
    assert not Message.assistant("Ha").cut_off


def test_an_empty_delta_is_passed_on_when_everything_was_said_again() -> None:
    resumption = Resumption(is_named=True)
    said = [event for event in (Started("r", "m", 1), Delta("ab")) for event in resumption.news(event)]
    assert len(said) == 2
    assert resumption.begin(UnavailableError("Lost."))
    finished = Finished(FinishReason.STOP, Usage(1, 0, 0, 1), Timings(0, 0, 0, 0, 0, 0))
    again = [Started("r", "m", 1), Delta("a"), Delta(""), Delta("b"), Delta(""), Delta("c"), finished]
    assert [event for each in again for event in resumption.news(each)] == [Delta(""), Delta("c"), finished]
