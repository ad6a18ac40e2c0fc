"""The gateway as a server, between real channels and scripted vision and LLM servers in this process."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gateway.app import SERVICES
from internvl_serving.common.v1 import embedding_pb2, generation_pb2
from internvl_serving.gateway.v1 import (
    chat_service_pb2,
    chat_service_pb2_grpc,
    content_pb2,
    conversation_service_pb2,
    media_service_pb2,
)
from internvl_serving.llm.v1 import llm_service_pb2_grpc
from shared.digest import digest_of
from shared.errors import (
    DeadlineExceeded,
    EmbeddingIncompatible,
    EmbeddingNotFound,
    InvalidGenerationConfig,
    MediaNotFound,
    MediaTooLarge,
    MediaUnreadable,
    NotReady,
    PromptTooLong,
    QueueFull,
    ServiceError,
)
from tests.rpc.scripted_stages import (
    ASSISTANT,
    CAT,
    DOG,
    GENERATION,
    USER,
    Client,
    ScriptedLlm,
    Stage,
    chat_request,
    error_of,
    gateway_over,
    message,
    part,
    running,
    text_of,
    until_serving,
)


@pytest.fixture
async def client(tmp_path: Path, redis_url: str) -> AsyncIterator[Client]:
    async with running(tmp_path, redis_url, max_media_bytes=32 << 20) as made:
        yield made


async def test_a_picture_and_a_question_become_a_streamed_answer(client: Client) -> None:
    events = await client.ask(CAT, "What is it?", return_token_ids=True)
    assert [event.WhichOneof("event") for event in events] == ["started", "delta", "delta", "finished"]
    started, finished = events[0].started, events[-1].finished
    assert (started.model, started.prompt_token_count, list(started.prompt_token_ids)) == ("scripted", 3, [1, 2, 3])
    assert started.request_id
    assert text_of(events) == "A cat."
    assert [list(event.delta.token_ids) for event in events[1:3]] == [[0], [1]]
    assert finished.finish_reason == generation_pb2.FINISH_REASON_STOP
    assert (finished.usage.prompt_token_count, finished.usage.output_token_count) == (3, 2)
    assert client.vision.known[digest_of(CAT)] == CAT


async def test_the_receipt_says_what_the_picture_cost(client: Client) -> None:
    first = (await client.ask(CAT))[-1].finished.receipts[0]
    assert (first.media_digest, first.tile_count, first.token_count) == (digest_of(CAT), 3, 768)
    assert (first.columns, first.rows) == (2, 1)
    assert first.cache_tier == embedding_pb2.CACHE_TIER_NONE
    assert first.encode_duration.nanos == first.preprocess_duration.nanos == first.queue_duration.nanos == 5_000_000
    assert (first.transfer_tier, first.transfer_duration.nanos) == (embedding_pb2.CACHE_TIER_LOCAL, 4_000_000)
    assert (first.embedding_size_bytes, first.transfer_size_bytes) == (768 * 64 * 4, 1000)
    again = (await client.ask(CAT))[-1].finished.receipts[0]
    assert (again.cache_tier, again.encode_duration.nanos) == (embedding_pb2.CACHE_TIER_STORE, 0)


async def test_the_timings_hold_the_model_s_and_the_gateway_s_own(client: Client) -> None:
    timings = (await client.ask("Hi"))[-1].finished.timings
    assert timings.queue_duration.nanos == 1_000_000
    assert timings.prefill_duration.nanos == 2_000_000
    assert timings.decode_duration.nanos == 3_000_000
    assert timings.output_tokens_per_second == pytest.approx(1 / 0.003)
    assert timings.time_to_first_token.ToNanoseconds() <= timings.total_duration.ToNanoseconds()


async def test_everything_that_was_asked_for_reaches_the_stages(client: Client) -> None:
    config = GENERATION(max_output_tokens=5, temperature=0.0, top_p=0.1, seed=7, stop_sequences=["x"], ignore_end=True)
    options = embedding_pb2.PreprocessOptions(max_tiles=4, thumbnail=False)
    picture = content_pb2.Media(inline=CAT, options=options)
    group = content_pb2.Part(group=content_pb2.MediaGroup(media=[picture, content_pb2.Media(inline=DOG)]))
    messages = [
        message("Hi"),
        message("", role=ASSISTANT),
        content_pb2.Message(role=USER, parts=[group, part("Both?")]),
    ]
    request = chat_service_pb2.ChatRequest(messages=messages, system_message="", generation_config=config)
    async for _ in client.chat.Chat(request):
        pass
    sent = client.llm.requests[0]
    assert sent.generation_config == config
    assert sent.prompt.HasField("system_message")
    assert [turn.role for turn in sent.prompt.turns] == [USER, ASSISTANT, USER]
    visual, words = sent.prompt.turns[2].segments
    assert [handle.source for handle in visual.visual.embeddings] == ["127.0.0.1:9"] * 2
    assert words.text == "\nBoth?"
    assert {header.options.max_tiles for header in client.vision.headers if header.media_digest == digest_of(CAT)} == {
        4
    }


async def test_absent_choices_stay_absent(client: Client) -> None:
    await client.ask("Hi")
    assert client.llm.requests[0].generation_config == GENERATION()
    assert not client.llm.requests[0].prompt.HasField("system_message")


async def test_a_conversation_is_kept_listed_and_deleted(client: Client) -> None:
    conversation_id = await client.conversation(system_message="Be brief.", ttl=Duration(seconds=100))
    finished = (await client.ask(CAT, "What?", conversation_id=conversation_id))[-1].finished
    await client.ask("Sure?", conversation_id=conversation_id)
    assert [turn.role for turn in client.llm.requests[1].prompt.turns] == [USER, ASSISTANT, USER]
    assert client.llm.requests[1].prompt.system_message == "Be brief."

    get = conversation_service_pb2.GetConversationRequest(conversation_id=conversation_id)
    found = (await client.conversations.GetConversation(get)).conversation
    assert (found.message_count, found.system_message) == (4, "Be brief.")
    assert 90 <= found.expire_time.seconds - found.create_time.seconds <= 110

    listing = conversation_service_pb2.ListMessagesRequest(conversation_id=conversation_id, page_size=3)
    page = await client.conversations.ListMessages(listing)
    assert [part.WhichOneof("content") for part in page.messages[0].parts] == ["media", "text"]
    assert page.messages[0].parts[0].media.digest == digest_of(CAT)
    assert (page.messages[1].message_id, page.messages[1].parts[0].text) == (finished.message_id, "A cat.")
    listing.page_token = page.next_page_token
    assert len((await client.conversations.ListMessages(listing)).messages) == 1

    await client.conversations.DeleteConversation(
        conversation_service_pb2.DeleteConversationRequest(conversation_id=conversation_id)
    )
    assert (await error_of(client.conversations.GetConversation(get))).reason == "CONVERSATION_NOT_FOUND"


async def test_a_conversation_survives_a_restart_of_the_gateway(tmp_path: Path, redis_url: str) -> None:
    async with running(tmp_path, redis_url) as client:
        conversation_id = await client.conversation()
        await client.ask(DOG, "What?", conversation_id=conversation_id)
    async with running(tmp_path, redis_url) as client:
        events = await client.ask("Sure?", conversation_id=conversation_id)
        assert text_of(events) == "A cat."
        assert client.vision.known == {digest_of(DOG): DOG}


async def test_a_picture_is_uploaded_once_and_then_named(client: Client) -> None:
    digest = digest_of(CAT)
    request = media_service_pb2.FindMissingRequest(digests=[digest])
    uploaded = await client.upload(digest, CAT[: 1 << 20], CAT[1 << 20 :])
    assert (uploaded.digest, uploaded.size_bytes) == (digest, len(CAT))
    assert uploaded.expire_time.seconds > 0
    assert not (await client.media.FindMissing(request)).missing_digests
    await client.ask(content_pb2.Media(digest=digest))
    assert client.vision.known[digest] == CAT


async def test_missing_media_are_named(client: Client) -> None:
    request = media_service_pb2.FindMissingRequest(digests=["0" * 64, "1" * 64])
    assert (await client.media.FindMissing(request)).missing_digests == ["0" * 64, "1" * 64]
    error = await error_of(client.ask(content_pb2.Media(digest="0" * 64)))
    assert (type(error), error.resource) == (MediaNotFound, "0" * 64)


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        (chat_service_pb2.ChatRequest(), "INVALID_REQUEST", "messages"),
        (chat_service_pb2.ChatRequest(messages=[content_pb2.Message()]), "INVALID_REQUEST", "messages[0].role"),
        (chat_service_pb2.ChatRequest(messages=[message()]), "EMPTY_MESSAGE", "messages[0]"),
        (
            chat_service_pb2.ChatRequest(messages=[content_pb2.Message(role=USER, parts=[content_pb2.Part()])]),
            "INVALID_REQUEST",
            "messages[0].parts[0]",
        ),
        (chat_request("x", content_pb2.Media()), "INVALID_REQUEST", "messages[0].parts[1].media"),
        (chat_request(content_pb2.Media(digest="x")), "INVALID_REQUEST", "messages[0].parts[0].media.digest"),
        (chat_request(b""), "MEDIA_UNREADABLE", "messages[0].parts[0].media"),
        (chat_request(b"x" * 2_000_001), "MEDIA_TOO_LARGE", "messages[0].parts[0].media"),
        (chat_request("x" * 1001), "INVALID_REQUEST", "messages"),
        (chat_request("x", conversation_id="x"), "CONVERSATION_NOT_FOUND", None),
        (chat_request("x", conversation_id="x", system_message="y"), "INVALID_REQUEST", "system_message"),
        (
            chat_service_pb2.ChatRequest(
                messages=[
                    content_pb2.Message(
                        role=USER, parts=[content_pb2.Part(group=content_pb2.MediaGroup()), part("What?")]
                    )
                ]
            ),
            "INVALID_REQUEST",
            "messages[0].parts[0].group",
        ),
    ],
)
async def test_a_request_that_cannot_be_answered_names_its_fault(
    tmp_path: Path, redis_url: str, request_: Any, reason: str, field: str | None
) -> None:
    async with running(tmp_path, redis_url, max_media_bytes=2_000_000, max_text_chars=1000) as client:
        error = await error_of(client.chat.Chat(request_).read())
        assert (error.reason, error.field) == (reason, field)
        assert client.llm.requests == []


@pytest.mark.parametrize(
    ("requests", "reason"),
    [
        ([], "INVALID_REQUEST"),
        ([{"chunk": b"x"}], "INVALID_REQUEST"),
        ([{"header": {"digest": "x"}}], "INVALID_REQUEST"),
        ([{"header": {"digest": "0" * 64}}, {"header": {"digest": "0" * 64}}], "INVALID_REQUEST"),
        ([{"header": {"digest": "0" * 64}}, {"chunk": b"x" * ((1 << 20) + 1)}], "INVALID_REQUEST"),
        ([{"header": {"digest": "0" * 64}}], "MEDIA_UNREADABLE"),
        ([{"header": {"digest": "0" * 64}}, {"chunk": b"x"}], "MEDIA_DIGEST_MISMATCH"),
        ([{"header": {"digest": "0" * 64}}, *[{"chunk": b"x" * (1 << 20)}] * 33], "MEDIA_TOO_LARGE"),
    ],
)
async def test_an_upload_that_is_not_what_it_should_be_is_refused(
    client: Client, requests: list[dict[str, Any]], reason: str
) -> None:
    upload = client.send_upload(*(media_service_pb2.UploadRequest(**request) for request in requests))
    assert (await error_of(upload)).reason == reason


async def test_too_many_digests_or_bad_ones_are_refused(client: Client) -> None:
    for digests, field in ((["0" * 64] * 1001, "digests"), (["0" * 64, "X" * 64], "digests[1]")):
        request = media_service_pb2.FindMissingRequest(digests=digests)
        assert (await error_of(client.media.FindMissing(request))).field == field


@pytest.mark.parametrize(
    ("error", "field"),
    [
        (PromptTooLong("Too long.", field="prompt"), "messages"),
        (InvalidGenerationConfig("No.", field="generation_config.top_p"), "generation_config.top_p"),
        (QueueFull("Later.", retry_after_s=2.0), None),
        (DeadlineExceeded("Late."), None),
    ],
)
async def test_what_the_model_says_reaches_the_client(client: Client, error: ServiceError, field: str | None) -> None:
    client.llm.errors = [error]
    known = await error_of(client.ask("Hi"))
    assert (type(known), known.message, known.field) == (type(error), error.message, field)
    assert known.retry_after_s == error.retry_after_s


@pytest.mark.parametrize("error", [MediaUnreadable("No picture.", field="chunk"), MediaTooLarge("Too many pixels.")])
async def test_what_vision_says_of_a_picture_names_its_place(client: Client, error: ServiceError) -> None:
    client.vision.error = error
    known = await error_of(client.ask("x", DOG))
    assert (type(known), known.message, known.field) == (type(error), error.message, "messages[0].parts[1].media")


async def test_a_lost_embedding_is_encoded_again_without_the_client_s_doing(client: Client) -> None:
    await client.ask(CAT)
    client.llm.errors = [EmbeddingNotFound("Gone.")]
    assert text_of(await client.ask(CAT)) == "A cat."


@pytest.mark.parametrize("kind", [EmbeddingNotFound, EmbeddingIncompatible])
async def test_an_embedding_that_stays_useless_is_the_client_s_error(client: Client, kind: type[ServiceError]) -> None:
    client.llm.errors = [kind("No use."), kind("No use.")]
    assert type(await error_of(client.ask(CAT))) is kind


async def test_a_stage_s_own_fault_is_an_internal_error_without_its_words(client: Client) -> None:
    client.llm.errors = [ValueError("/secret/path")]
    error = await error_of(client.ask("Hi"))
    assert error.reason == "INTERNAL"
    assert "secret" not in error.message


async def test_a_busy_conversation_refuses_a_second_turn(client: Client) -> None:
    conversation_id = await client.conversation()
    client.llm.gate = asyncio.Event()
    call = client.chat.Chat(chat_request("1", conversation_id=conversation_id))
    events = aiter(call)
    await anext(events)
    assert (await error_of(client.ask("2", conversation_id=conversation_id))).reason == "CONVERSATION_BUSY"
    client.llm.gate.set()
    assert [event async for event in events][-1].finished.message_id


async def test_a_stage_that_is_away_is_named(client: Client) -> None:
    await client.vision_stage.server.stop(None)
    assert (await error_of(client.ask(DOG))).reason == "VISION_UNAVAILABLE"
    assert text_of(await client.ask("Hi")) == "A cat."
    await client.llm_stage.server.stop(None)
    assert (await error_of(client.ask("Hi"))).reason == "LLM_UNAVAILABLE"


async def test_a_model_that_drains_is_away_and_not_the_gateway(client: Client) -> None:
    client.llm.errors = [NotReady("Shutting down.", retry_after_s=1.0) for _ in range(20)]
    assert (await error_of(client.ask("Hi"))).reason == "LLM_UNAVAILABLE"


async def test_an_answer_that_breaks_in_the_middle_ends_with_an_error(client: Client) -> None:
    client.llm.late_error = NotReady("Shutting down.")
    call = client.chat.Chat(chat_request("Hi"))
    events = [await call.read() for _ in range(3)]
    assert text_of(events) == "A cat."
    assert (await error_of(call.read())).reason == "LLM_UNAVAILABLE"
    assert len(client.llm.requests) == 1


async def test_without_a_store_chats_go_on_and_what_needs_it_says_so(tmp_path: Path) -> None:
    async with running(tmp_path) as client:
        assert text_of(await client.ask(CAT, "What?")) == "A cat."
        create = conversation_service_pb2.CreateConversationRequest()
        request = media_service_pb2.FindMissingRequest(digests=["0" * 64])
        for call in (
            client.conversations.CreateConversation(create),
            client.ask("Hi", conversation_id="a" * 32),
            client.media.FindMissing(request),
            client.upload(digest_of(DOG), DOG),
        ):
            assert (await error_of(call)).reason == "STORE_UNAVAILABLE"


async def test_request_id_and_deadline_reach_both_stages(client: Client) -> None:
    call = client.chat.Chat(chat_request(DOG), timeout=5.0, metadata=(("x-request-id", "turn-1"),))
    events = [event async for event in call]
    assert events[0].started.request_id == "turn-1"
    seen = client.vision.calls + client.llm.calls
    assert {identity for identity, _ in seen} == {"turn-1"}
    assert all(remaining is not None and 0 < remaining < 5.5 for _, remaining in seen)
    assert len(seen) == 3  # the caches, the bytes, the model


async def test_a_deadline_that_passes_is_said_to_have_passed(client: Client) -> None:
    client.llm.gate = asyncio.Event()
    call = client.chat.Chat(chat_request("Hi"), timeout=0.5)
    assert isinstance(await error_of(drained(call)), DeadlineExceeded)
    await asyncio.wait_for(client.llm.cancelled.wait(), 5)


async def drained(call: Any) -> None:
    async for _ in call:
        pass


async def test_a_client_that_cancels_ends_the_model_s_work(client: Client) -> None:
    conversation_id = await client.conversation()
    client.llm.gate = asyncio.Event()
    call = client.chat.Chat(chat_request("Hi", conversation_id=conversation_id))
    await call.read()
    call.cancel()
    await asyncio.wait_for(client.llm.cancelled.wait(), 5)
    client.llm.gate = None
    get = conversation_service_pb2.GetConversationRequest(conversation_id=conversation_id)
    assert (await client.conversations.GetConversation(get)).conversation.message_count == 0


async def test_an_answer_that_is_complete_is_not_cancelled_at_the_model(client: Client) -> None:
    for _ in range(5):
        await client.ask("Hi")
    assert client.llm.ended == 5
    assert not client.llm.cancelled.is_set()


async def test_many_chats_at_once_do_not_mix(client: Client) -> None:
    pictures = [bytes([number]) * 1000 for number in range(32)]
    answers = await asyncio.gather(*(client.ask(picture, str(index)) for index, picture in enumerate(pictures)))
    for picture, events in zip(pictures, answers, strict=True):
        assert [receipt.media_digest for receipt in events[-1].finished.receipts] == [digest_of(picture)]


async def test_the_gateway_is_ready_when_a_model_is(tmp_path: Path) -> None:
    llm = ScriptedLlm()
    stage = Stage(lambda server: llm_service_pb2_grpc.add_LlmServiceServicer_to_server(llm, server))
    async with gateway_over(tmp_path, "127.0.0.1:1", stage.address, "redis://127.0.0.1:1") as channel:
        checks, chat = health_pb2_grpc.HealthStub(channel), chat_service_pb2_grpc.ChatServiceStub(channel)
        answer = await checks.Check(health_pb2.HealthCheckRequest(service="readiness"))
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert isinstance(await error_of(chat.Chat(chat_request("Hi")).read()), NotReady)
        await stage.server.start()
        await until_serving(channel)
        await stage.server.stop(None)
        answer = await checks.Check(health_pb2.HealthCheckRequest(service="readiness"))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_lists_every_service(client: Client) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    answer = await anext(aiter(call))
    call.cancel()
    assert set(SERVICES) < {service.name for service in answer.list_services_response.service}
