"""The blocking client against a scripted gateway."""

import os
import time
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2

from internvl_client import (
    CacheTier,
    Client,
    ConversationBusyError,
    DeadlineError,
    Delta,
    Finished,
    FinishReason,
    GenerationConfig,
    Image,
    ImageGroup,
    InternVLError,
    InvalidRequestError,
    Message,
    NotFoundError,
    NotPermittedError,
    OverloadedError,
    RankingMethod,
    Role,
    ServerError,
    Started,
    Tool,
    UnauthenticatedError,
    UnavailableError,
    Video,
)
from tests.client.fake_gateway import (
    FakeGateway,
    answer_of,
    candidates_of,
    digests_of,
    endless,
    refuse,
    resource_info,
)

SMALL = Image.from_bytes(b"small", max_tiles=2, thumbnail=False)
LARGE = Image.from_bytes(os.urandom(300 << 10))
HUGE = Image.from_bytes(os.urandom((2 << 20) + 5))


def test_ask_returns_the_whole_answer(client: Client) -> None:
    answer = client.ask(SMALL, "What is this?")
    assert str(answer) == "It is a cat."
    assert (answer.finish_reason, answer.model, answer.request_id) == (FinishReason.STOP, "tiny", "from-server")
    assert (answer.usage.num_prompt_tokens, answer.usage.num_visual_tokens, answer.usage.num_output_tokens) == (9, 4, 3)
    assert answer.tokens_per_second == pytest.approx(4.0)
    assert (answer.receipts[0].cache_tier, answer.receipts[0].cache_hit) == (CacheTier.NONE, False)


def test_chat_yields_started_deltas_finished(client: Client) -> None:
    events = list(client.chat(["What is this?"]))
    assert [type(event) for event in events] == [Started, Delta, Delta, Finished]


def test_stream_yields_text_and_then_has_the_answer(client: Client) -> None:
    with client.stream("Hello") as stream:
        assert [str(delta) for delta in stream] == ["It ", "is a cat."]
        assert stream.answer().text == "It is a cat."
        assert stream.started is not None


def test_a_request_carries_exactly_what_was_given(gateway: FakeGateway, client: Client) -> None:
    client.ask(
        Message.user(ImageGroup.of(SMALL, SMALL), "\nOld?"),
        Message.assistant("Old."),
        SMALL,
        "New?",
        system_message="",
        config=GenerationConfig(max_output_tokens=5, temperature=0.0, top_k=3),
        top_k=7,
        stop_sequences=("a", "b"),
        return_token_ids=True,
    )
    request = gateway.chats[0]
    assert [message.role for message in request.messages] == [1, 2, 1]
    assert [medium.inline for medium in request.messages[0].parts[0].group.media] == [b"small"] * 2
    media = request.messages[2].parts[0].media
    assert (media.inline, media.options.max_tiles, media.options.thumbnail) == (b"small", 2, False)
    assert media.options.HasField("thumbnail")
    assert request.HasField("system_message")
    config = request.generation_config
    assert (config.max_output_tokens, config.temperature, config.top_k) == (5, 0.0, 7)
    assert (list(config.stop_sequences), request.return_token_ids) == (["a", "b"], True)
    assert (config.HasField("temperature"), config.HasField("top_p")) == (True, False)


def test_the_best_candidate_is_the_answer(gateway: FakeGateway, client: Client) -> None:
    gateway.answer = lambda request, context: candidates_of("first", "second", "third", best=1)
    answer = client.ask("Hi", candidate_count=3, top_logprobs=0)
    assert (answer.text, answer.token_ids, answer.best_index) == ("second", (1, 1), 1)
    assert [candidate.text for candidate in answer.candidates] == ["first", "second", "third"]
    assert answer.candidates[2].step_scores == (0.25, 0.5)
    assert [(each.token_id, each.token, each.logprob) for each in answer.logprobs] == [(1, b"x", -1.0)] * 2
    config = gateway.chats[0].generation_config
    assert (config.candidate_count, config.HasField("top_logprobs"), config.top_logprobs) == (3, True, 0)


def test_an_answer_goes_on_as_a_message_with_its_calls(gateway: FakeGateway, client: Client) -> None:
    gateway.answer = lambda request, context: candidates_of("add")
    answer = client.ask("Hi", tools=[Tool("add", parameters={"type": "object"})], max_total_tiles=9)
    assert [(call.name, call.arguments, call.tool_call_id) for call in answer.tool_calls] == [
        ("add", {"x": 1}, "call_0")
    ]
    client.ask("Hi", answer.message, Message.tool("3"), ranking_method=RankingMethod.CRITIC)
    first, second = gateway.chats
    assert (first.tools[0].name, first.tools[0].parameters_json_schema) == ("add", '{"type": "object"}')
    assert (first.max_total_tiles, second.HasField("max_total_tiles")) == (9, False)
    assert (first.ranking_method, second.ranking_method) == (0, 2)
    assert [message.role for message in second.messages] == [1, 2, 3]
    assert [part.WhichOneof("content") for part in second.messages[1].parts] == ["text", "tool_call"]
    assert client.create_conversation().ask(Message.tool("4")).text == "add"
    assert [message.role for message in gateway.chats[2].messages] == [3]


def test_a_large_video_is_uploaded_as_a_picture_is(gateway: FakeGateway, client: Client) -> None:
    clip = Video.from_bytes(os.urandom(300 << 10), num_segments=4)
    client.create_conversation().ask(clip, "What?")
    gateway.media.clear()
    client.ask(clip, "What?")
    assert gateway.uploads == [[300 << 10]] * 2


def test_the_request_id_is_sent_and_drawn_when_absent(gateway: FakeGateway, client: Client) -> None:
    client.ask("One", request_id="mine-1")
    with client.stream("Two") as stream:
        stream.answer()
    assert [metadata["x-request-id"] for metadata in gateway.metadata] == ["mine-1", stream.request_id]
    with pytest.raises(ValueError, match="request id"):
        client.ask("Three", request_id="not fit")


def test_a_large_picture_is_uploaded_once_in_chunks(gateway: FakeGateway, client: Client) -> None:
    client.ask(HUGE, LARGE, SMALL, "First")
    client.ask(HUGE, "Second")
    assert gateway.uploads == [[1 << 20, 1 << 20, 5], [300 << 10]]
    assert gateway.asked == [[HUGE.digest, LARGE.digest]]
    assert digests_of(gateway.chats[1]) == [HUGE.digest]


def test_a_picture_that_the_server_holds_is_not_uploaded(gateway: FakeGateway, client: Client) -> None:
    assert LARGE.content is not None
    gateway.media[LARGE.digest] = LARGE.content
    client.ask(LARGE, "What?")
    assert gateway.uploads == []


def test_small_pictures_beyond_the_total_are_uploaded(gateway: FakeGateway, client: Client) -> None:
    images = [Image.from_bytes(os.urandom(250 << 10)) for _ in range(18)]
    client.ask(*images, "How many?")
    assert len(gateway.uploads) == 2
    assert gateway.chats[0].ByteSize() < 5 << 20


def test_a_picture_that_the_server_has_lost_is_uploaded_again(gateway: FakeGateway, client: Client) -> None:
    client.ask(LARGE, "First")
    gateway.media.clear()
    assert client.ask(LARGE, "Second").text == "It is a cat."
    assert len(gateway.uploads) == 2


def test_a_lost_picture_of_an_earlier_turn_is_uploaded_again(gateway: FakeGateway, client: Client) -> None:
    conversation = client.create_conversation()
    conversation.ask(SMALL, "First")

    def needs_the_picture(request: Any, context: grpc.ServicerContext) -> Any:
        if SMALL.digest not in gateway.media:
            refuse(context, grpc.StatusCode.NOT_FOUND, "MEDIA_NOT_FOUND", resource_info(SMALL.digest))
        return answer_of("Yes.")

    gateway.answer = needs_the_picture
    assert conversation.ask("Second").text == "Yes."
    assert gateway.chats[-1].conversation_id == conversation.conversation_id


def test_an_unknown_digest_without_bytes_is_an_error_at_once(gateway: FakeGateway, client: Client) -> None:
    with pytest.raises(NotFoundError) as caught:
        client.ask(Image.from_digest("0" * 64), "What?")
    assert (caught.value.reason, caught.value.resource) == ("MEDIA_NOT_FOUND", "0" * 64)
    assert len(gateway.chats) == 1


def test_a_picture_that_stays_lost_is_an_error_after_one_more_try(gateway: FakeGateway, client: Client) -> None:
    gateway.answer = lambda request, context: refuse(
        context, grpc.StatusCode.NOT_FOUND, "MEDIA_NOT_FOUND", resource_info(LARGE.digest)
    )  # type: ignore[assignment,return-value]
    with pytest.raises(NotFoundError):
        client.ask(LARGE, "What?")
    assert len(gateway.chats) == 2


@pytest.mark.parametrize(
    ("code", "reason", "detail", "kind", "field", "retry_after_s"),
    [
        (
            grpc.StatusCode.INVALID_ARGUMENT,
            "EMPTY_MESSAGE",
            error_details_pb2.BadRequest(
                field_violations=[error_details_pb2.BadRequest.FieldViolation(field="messages")]
            ),
            InvalidRequestError,
            "messages",
            None,
        ),
        (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "QUEUE_FULL",
            error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000)),
            OverloadedError,
            None,
            1.5,
        ),
        (
            grpc.StatusCode.ABORTED,
            "CONVERSATION_BUSY",
            error_details_pb2.QuotaFailure(),
            ConversationBusyError,
            None,
            None,
        ),
        (grpc.StatusCode.INTERNAL, "INTERNAL", error_details_pb2.QuotaFailure(), ServerError, None, None),
        (
            grpc.StatusCode.UNAUTHENTICATED,
            "API_KEY_INVALID",
            error_details_pb2.QuotaFailure(),
            UnauthenticatedError,
            None,
            None,
        ),
        (
            grpc.StatusCode.PERMISSION_DENIED,
            "NOT_PERMITTED",
            error_details_pb2.QuotaFailure(),
            NotPermittedError,
            None,
            None,
        ),
    ],
)
def test_a_status_becomes_the_error_it_stands_for(
    gateway: FakeGateway, client: Client, code: Any, reason: str, detail: Any, kind: Any, field: Any, retry_after_s: Any
) -> None:
    gateway.answer = lambda request, context: refuse(context, code, reason, detail)  # type: ignore[assignment,return-value]
    with pytest.raises(InternVLError) as caught:
        client.ask("Hello", request_id="abc")
    error = caught.value
    assert type(error) is kind
    assert (error.code, error.reason, error.message, error.request_id) == (code, reason, "Ours.", "abc")
    assert (error.field, error.retry_after_s) == (field, retry_after_s)


def test_an_error_after_some_text_is_raised_where_it_happens(gateway: FakeGateway, client: Client) -> None:
    def breaks_off(request: Any, context: grpc.ServicerContext) -> Any:
        yield from list(answer_of("Half"))[:2]
        refuse(context, grpc.StatusCode.UNAVAILABLE, "LLM_UNAVAILABLE")

    gateway.answer = breaks_off
    with client.stream("Hello") as stream:
        assert next(stream).text == "Half"
        with pytest.raises(UnavailableError) as caught:
            next(stream)
    assert caught.value.reason == "LLM_UNAVAILABLE"
    assert len(gateway.chats) == 1


def test_a_refusal_before_any_answer_is_tried_again(gateway: FakeGateway, client: Client) -> None:
    def ready_at_the_second_call(request: Any, context: grpc.ServicerContext) -> Any:
        if len(gateway.chats) == 1:
            refuse(context, grpc.StatusCode.UNAVAILABLE, "NOT_READY")
        return answer_of("Now.")

    gateway.answer = ready_at_the_second_call
    assert client.ask("Hello").text == "Now."


def test_a_stream_that_just_ends_is_no_answer(gateway: FakeGateway, client: Client) -> None:
    gateway.answer = lambda request, context: iter(list(answer_of("Half"))[:2])
    with pytest.raises(ServerError, match="broke off"):
        client.ask("Hello")


def test_closing_a_stream_cancels_the_call(gateway: FakeGateway, client: Client) -> None:
    gateway.answer = lambda request, context: endless(gateway, context)
    with client.stream("Hello") as stream:
        next(stream)
    assert gateway.cancelled.wait(5)


def test_leaving_a_loop_cancels_the_call(gateway: FakeGateway, client: Client) -> None:
    gateway.answer = lambda request, context: endless(gateway, context)
    for event in client.chat(["Hello"]):
        if isinstance(event, Delta):
            break
    assert gateway.cancelled.wait(5)


def test_timeout_s_ends_the_call(gateway: FakeGateway, client: Client) -> None:
    gateway.answer = lambda request, context: endless(gateway, context)
    with pytest.raises(TimeoutError) as caught:
        client.ask("Hello", timeout_s=0.2)
    assert isinstance(caught.value, DeadlineError)


def test_nobody_at_the_address_is_unavailable() -> None:
    started = time.monotonic()
    with Client("127.0.0.1:1") as client, pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1"):
        client.ask("Hello")
    assert time.monotonic() - started < 20


def test_conversations_are_created_read_and_deleted(gateway: FakeGateway, client: Client) -> None:
    conversation = client.create_conversation(system_message="", ttl_s=1.5)
    created = gateway.conversations[conversation.conversation_id]
    assert (created.HasField("system_message"), created.ttl.ToMilliseconds()) == (True, 1500)
    assert conversation.info().system_message == ""
    conversation.delete()
    with pytest.raises(NotFoundError) as caught:
        conversation.info()
    assert caught.value.reason == "CONVERSATION_NOT_FOUND"


def test_messages_of_a_conversation_come_page_by_page(client: Client) -> None:
    messages = list(client.create_conversation().messages(page_size=2))
    assert [message.message_id for message in messages] == ["0", "1", "2"]
    assert messages[0].role is Role.USER
    assert (messages[0].text, messages[0].images[0].digest) == ("0", "d" * 64)


def test_a_picture_can_be_uploaded_ahead(gateway: FakeGateway, client: Client) -> None:
    assert client.find_missing([SMALL.digest]) == [SMALL.digest]
    assert client.upload(SMALL).size_bytes == 5
    assert client.find_missing([SMALL.digest]) == []
    with pytest.raises(ValueError, match="no bytes"):
        client.upload(Image.from_digest(SMALL.digest))
