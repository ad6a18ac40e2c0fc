"""Videos, candidates, critics, tools, batches and media by themselves, through the gateway between real channels."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from gateway.media import RedisMediaStore
from gateway.settings import GatewaySettings
from internvl_serving.common.v1 import embedding_pb2, generation_pb2
from internvl_serving.gateway.v1 import (
    batch_service_pb2,
    chat_service_pb2,
    content_pb2,
    conversation_service_pb2,
    media_service_pb2,
)
from internvl_serving.llm.v1 import llm_service_pb2
from shared.digest import digest_of
from shared.errors import (
    InvalidJsonSchema,
    InvalidRequest,
    LlmUnavailable,
    MediaUnreadable,
    NotSupportedByModel,
    PromptTooLong,
    ServiceError,
    VideoRangeEmpty,
)
from shared.rpc.status import from_rpc_error
from tests.gateway.fakes_gateway import redis_of
from tests.rpc.scripted_stages import (
    ASSISTANT,
    CAT,
    DOG,
    GENERATION,
    USER,
    Client,
    chat_request,
    error_of,
    message,
    running,
    running_with_critic,
    text_of,
)

STOP, LENGTH = generation_pb2.FINISH_REASON_STOP, generation_pb2.FINISH_REASON_LENGTH
CRITIC = chat_service_pb2.RANKING_METHOD_CRITIC
LOG_PROBABILITY = chat_service_pb2.RANKING_METHOD_LOG_PROBABILITY
RESULT = llm_service_pb2.CandidateResult
CALL = generation_pb2.ToolCall


@pytest.fixture
async def client(tmp_path: Path, redis_url: str) -> AsyncIterator[Client]:
    async with running(tmp_path, redis_url) as made:
        yield made


@pytest.fixture
async def judged(tmp_path: Path, redis_url: str) -> AsyncIterator[Client]:
    """A client of a gateway with a critic."""
    async with running_with_critic(tmp_path, redis_url) as made:
        yield made


def video(content: bytes = CAT, **options: Any) -> content_pb2.Media:
    chosen = embedding_pb2.PreprocessOptions(video=embedding_pb2.VideoOptions(**options))
    return content_pb2.Media(inline=content, options=chosen)


def shown(turn: llm_service_pb2.Turn) -> str:
    return "".join(
        f"<{segment.visual.frame}>" if segment.WhichOneof("content") == "visual" else segment.text
        for segment in turn.segments
    )


# Videos and tile budgets.


async def test_a_video_is_seen_frame_by_frame(client: Client) -> None:
    clip = video(segment_count=3, start_seconds=1.5, end_seconds=4.0)
    events = await client.ask(clip, "What happens?")
    (header,) = {header.SerializeToString(): header for header in client.vision.headers}.values()
    assert header.options == clip.options
    turn = client.llm.requests[0].prompt.turns[0]
    assert shown(turn) == "Frame1: <0>\nFrame2: <1>\nFrame3: <2>\nWhat happens?"
    handles = [segment.visual.embeddings[0] for segment in turn.segments if segment.HasField("visual")]
    assert {(handle.digest, handle.frame_count) for handle in handles} == {(handles[0].digest, 3)}
    (receipt,) = events[-1].finished.receipts
    assert [(frame.index, frame.time_seconds) for frame in receipt.frames] == [(0, 0.0), (10, 1.0), (20, 2.0)]
    assert (receipt.tile_count, receipt.media_digest) == (3, digest_of(CAT))


async def test_a_later_turn_sees_the_same_frames(client: Client) -> None:
    conversation_id = await client.conversation()
    clip = video(segment_count=2, start_seconds=0.0)
    await client.ask(clip, "What?", conversation_id=conversation_id)
    await client.ask("And then?", conversation_id=conversation_id)
    assert {header.options.SerializeToString() for header in client.vision.headers} == {
        clip.options.SerializeToString()
    }
    assert shown(client.llm.requests[1].prompt.turns[0]) == "Frame1: <0>\nFrame2: <1>\nWhat?"
    listing = conversation_service_pb2.ListMessagesRequest(conversation_id=conversation_id)
    first = (await client.conversations.ListMessages(listing)).messages[0]
    assert first.parts[0].media.options == clip.options


async def test_a_tile_budget_reaches_the_vision_service_as_shares(client: Client) -> None:
    many = content_pb2.Media(inline=DOG, options=embedding_pb2.PreprocessOptions(max_tiles=40))
    await client.ask(CAT, many, "Both?", max_total_tiles=14)
    assert {header.options.max_tiles for header in client.vision.headers} == {6}
    client.vision.headers.clear()
    await client.ask(CAT, many, "Both?", max_total_tiles=26)
    assert {(header.options.HasField("max_tiles"), header.options.max_tiles) for header in client.vision.headers} == {
        (False, 0),  # as without a budget
        (True, 12),
    }


PLACE = "messages[0].parts[0].media"


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        (chat_request(video(segment_count=-1)), "INVALID_REQUEST", f"{PLACE}.options.video.segment_count"),
        (chat_request(video(segment_count=0)), "INVALID_REQUEST", f"{PLACE}.options.video.segment_count"),
        (chat_request(video(start_seconds=float("nan"))), "INVALID_REQUEST", f"{PLACE}.options.video.start_seconds"),
        (chat_request(video(b"")), "MEDIA_UNREADABLE", PLACE),
        (
            chat_request(content_pb2.Part(group=content_pb2.MediaGroup(media=[video()]))),
            "INVALID_REQUEST",
            "messages[0].parts[0].group.media[0].options.video",
        ),
        (chat_request(CAT, DOG, max_total_tiles=1), "INVALID_REQUEST", "max_total_tiles"),
        (chat_request(CAT, max_total_tiles=0), "INVALID_REQUEST", "max_total_tiles"),
        (chat_request(video(segment_count=9), max_total_tiles=8), "INVALID_REQUEST", "max_total_tiles"),
        (
            chat_request("Hi", generation_config=GENERATION(candidate_count=17)),
            "INVALID_GENERATION_CONFIG",
            "generation_config.candidate_count",
        ),
        (
            chat_request("Hi", generation_config=GENERATION(json_schema="{")),
            "INVALID_JSON_SCHEMA",
            "generation_config.json_schema",
        ),
        (chat_request("Hi", tools=[generation_pb2.Tool(name="a b")]), "INVALID_REQUEST", "tools[0].name"),
        (
            chat_request("Hi", tools=[generation_pb2.Tool(name="a", parameters_json_schema="[]")]),
            "INVALID_JSON_SCHEMA",
            "tools[0].parameters_json_schema",
        ),
        (chat_request("Hi", ranking_method=CRITIC), "NO_CRITIC", None),
        (chat_request("Hi", ranking_method=9), "INVALID_REQUEST", "ranking_method"),
        (
            chat_service_pb2.ChatRequest(messages=[message("3", role=generation_pb2.ROLE_TOOL)]),
            "INVALID_REQUEST",
            "messages[0].role",
        ),
        (
            chat_request(content_pb2.Part(tool_call=CALL(name="f", arguments_json="{}"))),
            "INVALID_REQUEST",
            "messages[0].parts",
        ),
    ],
)
async def test_bad_input_is_refused_before_any_work(
    client: Client, request_: chat_service_pb2.ChatRequest, reason: str, field: str | None
) -> None:
    error = await error_of(client.chat.Chat(request_).read())
    assert (error.reason, error.field) == (reason, field)
    assert client.vision.calls == client.llm.calls == []


@pytest.mark.parametrize(
    ("error", "field"),
    [
        (VideoRangeEmpty("Outside.", field="header.options.video.start_seconds"), ".options.video.start_seconds"),
        (InvalidRequest("Too many.", field="header.options.video.segment_count"), ".options.video.segment_count"),
        (MediaUnreadable("No frames.", field="chunk"), ""),
    ],
)
async def test_what_vision_says_of_a_video_names_its_option(client: Client, error: ServiceError, field: str) -> None:
    client.vision.error = error
    known = await error_of(client.ask("x", video(segment_count=10_000)))
    assert (type(known), known.field) == (type(error), f"messages[0].parts[1].media{field}")


# Generation settings.


async def test_every_setting_reaches_the_model(client: Client) -> None:
    config = GENERATION(
        candidate_count=2,
        top_logprobs=3,
        json_schema='{"type": "object"}',
        grounding=True,
        visual_position_stride=64,
        include_special_tokens=True,
    )
    await client.ask("Hi", generation_config=config)
    assert client.llm.requests[0].generation_config == config


@pytest.mark.parametrize(
    ("error", "field"),
    [
        (InvalidJsonSchema("Cannot be met.", field="generation_config.json_schema"), "generation_config.json_schema"),
        (NotSupportedByModel("No tags.", field="generation_config.grounding"), "generation_config.grounding"),
        (NotSupportedByModel("No tools.", field="prompt.tools"), "tools"),
        (InvalidRequest("No object.", field="prompt.tools[0]"), "tools[0]"),
    ],
)
async def test_what_the_model_cannot_do_names_the_setting(client: Client, error: ServiceError, field: str) -> None:
    client.llm.errors = [error]
    known = await error_of(client.ask("Hi"))
    assert (type(known), known.message, known.field) == (type(error), error.message, field)


# Candidates.


def texts_by_candidate(events: list[chat_service_pb2.ChatResponse]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for event in events:
        if event.HasField("delta"):
            texts[event.delta.candidate_index] = texts.get(event.delta.candidate_index, "") + event.delta.text
    return texts


async def test_candidates_stream_side_by_side_and_the_likeliest_is_kept(client: Client) -> None:
    client.llm.candidates = [
        ("One.", RESULT(finish_reason=STOP, output_token_count=2, mean_logprob=-2.0)),
        ("Two.", RESULT(finish_reason=LENGTH, output_token_count=3, mean_logprob=-1.0)),
    ]
    conversation_id = await client.conversation()
    events = await client.ask("Hi", conversation_id=conversation_id)
    assert texts_by_candidate(events) == {0: "One.", 1: "Two."}
    finished = events[-1].finished
    assert (finished.best_candidate_index, finished.finish_reason) == (1, LENGTH)
    assert [(each.output_token_count, each.score) for each in finished.candidates] == [(2, -2.0), (3, -1.0)]
    listing = conversation_service_pb2.ListMessagesRequest(conversation_id=conversation_id)
    assert (await client.conversations.ListMessages(listing)).messages[1].parts[0].text == "Two."


GOLDEN = sorted((Path(__file__).parents[1] / "golden/expected").glob("*/prm.json"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.parent.name)
async def test_a_critic_ranks_the_golden_candidates_as_the_reference_does(judged: Client, path: Path) -> None:
    golden = json.loads(path.read_text())
    judged.llm.candidates = [(entry["candidate"], RESULT(finish_reason=STOP)) for entry in golden["candidates"]]
    judged.critic.step_scores = {
        step: score
        for entry in golden["candidates"]
        for step, score in zip(entry["steps"], entry["step_scores"], strict=True)
    }
    finished = (await judged.ask(CAT, golden["question"]))[-1].finished
    for candidate, entry in zip(finished.candidates, golden["candidates"], strict=True):
        assert list(candidate.step_scores) == pytest.approx(entry["step_scores"])
        assert candidate.score == pytest.approx(entry["mean_score"])
    order = sorted(range(len(finished.candidates)), key=lambda index: -finished.candidates[index].score)
    assert order == golden["ranking_by_mean"]
    assert finished.best_candidate_index == order[0]
    asked = judged.critic.scored[0]
    assert (asked.prompt.system_message, list(asked.choices)) == (golden["system_message"], ["+", "-"])
    # The critic's own vision service saw the picture; the model's saw it once.
    assert judged.critic_vision.known == judged.vision.known == {digest_of(CAT): CAT}


async def test_log_probability_can_be_asked_for_beside_a_critic(judged: Client) -> None:
    judged.llm.candidates = [("a", RESULT(mean_logprob=-1.0)), ("b", RESULT(mean_logprob=-2.0))]
    judged.critic.step_scores = {"b": 1.0}
    assert (await judged.ask("Hi"))[-1].finished.best_candidate_index == 1
    judged.critic.scored.clear()
    finished = (await judged.ask("Hi", ranking_method=LOG_PROBABILITY))[-1].finished
    assert (finished.best_candidate_index, judged.critic.scored) == (0, [])


async def test_a_critic_that_is_down_is_named_only_to_who_asked_for_it(judged: Client) -> None:
    judged.llm.candidates = [("a", RESULT(mean_logprob=-2.0)), ("b", RESULT(mean_logprob=-1.0))]
    await judged.critic_stage.server.stop(None)
    assert (await judged.ask("Hi"))[-1].finished.best_candidate_index == 1
    error = await error_of(judged.ask("Hi", ranking_method=CRITIC))
    assert (error.reason, error.retry_after_s) == ("CRITIC_UNAVAILABLE", 1.0)


async def test_a_dialogue_too_long_for_the_critic_is_the_request_s_fault(judged: Client) -> None:
    judged.critic.errors = [PromptTooLong("Too long.", field="prompt")]
    error = await error_of(judged.ask("Hi", ranking_method=CRITIC))
    assert (error.reason, error.field) == ("PROMPT_TOO_LONG", "messages")


def test_a_critic_has_both_services_or_neither(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--vision-target", "v:1", "--llm-target", "l:1"]
    made = GatewaySettings.from_command_line("gateway", [*flags])
    assert made.critic_llm_target == ""
    both = [*flags, "--critic-vision-target", "cv:1", "--critic-llm-target", "cl:1"]
    assert GatewaySettings.from_command_line("gateway", both).critic_llm_target == "cl:1"
    for half in (["--critic-vision-target", "cv:1"], ["--critic-llm-target", "cl:1"]):
        with pytest.raises(SystemExit):
            GatewaySettings.from_command_line("gateway", [*flags, *half])
        assert "--critic-llm-target" in capsys.readouterr().err


# Tools.


async def test_a_call_of_a_tool_is_kept_and_answered(client: Client) -> None:
    tool = generation_pb2.Tool(name="add", description="Adds.", parameters_json_schema='{"type": "object"}')
    call = CALL(name="add", arguments_json='{"a": 1}')
    reason = generation_pb2.FINISH_REASON_TOOL_CALLS
    client.llm.candidates = [("", RESULT(finish_reason=reason, tool_calls=[call]))]
    conversation_id = await client.conversation()
    finished = (await client.ask("Add.", conversation_id=conversation_id, tools=[tool]))[-1].finished
    assert finished.finish_reason == reason
    (named,) = finished.candidates[0].tool_calls
    assert (named.name, named.arguments_json, bool(named.tool_call_id)) == ("add", '{"a": 1}', True)

    client.llm.candidates = []
    answer = message("2", role=generation_pb2.ROLE_TOOL)
    request = chat_service_pb2.ChatRequest(messages=[answer], conversation_id=conversation_id, tools=[tool])
    assert text_of([event async for event in client.chat.Chat(request)]) == "A cat."
    prompt = client.llm.requests[1].prompt
    assert list(prompt.tools) == [tool]
    assert [turn.role for turn in prompt.turns] == [USER, ASSISTANT, generation_pb2.ROLE_TOOL]
    assert prompt.turns[1].segments[0].tool_call == named
    assert prompt.turns[2].segments[0].text == "2"
    listing = conversation_service_pb2.ListMessagesRequest(conversation_id=conversation_id)
    listed = (await client.conversations.ListMessages(listing)).messages
    assert [each.role for each in listed] == [USER, ASSISTANT, generation_pb2.ROLE_TOOL, ASSISTANT]
    assert listed[1].parts[0].tool_call == named


# Batches.


async def create(client: Client, *items: chat_service_pb2.ChatRequest, **more: Any) -> batch_service_pb2.Batch:
    request = batch_service_pb2.CreateBatchRequest(items=items, **more)
    return (await client.batches.CreateBatch(request)).batch


async def results(client: Client, batch_id: str) -> dict[int, batch_service_pb2.BatchResult]:
    call = client.batches.StreamResults(batch_service_pb2.StreamResultsRequest(batch_id=batch_id))
    return {response.result.item_index: response.result async for response in call}


async def get(client: Client, batch_id: str) -> batch_service_pb2.Batch:
    return (await client.batches.GetBatch(batch_service_pb2.GetBatchRequest(batch_id=batch_id))).batch


async def test_a_batch_answers_each_item_as_a_chat_would(client: Client) -> None:
    client.llm.refused = {"\nBad?": PromptTooLong("Too long.", field="prompt")}
    items = [
        chat_request(CAT, "Good?", return_token_ids=True),
        chat_request(DOG, "Bad?"),
        chat_request(content_pb2.Media(digest="0" * 64)),
        chat_request(content_pb2.Media(digest="x")),
        chat_request(),
        chat_request(b"", "Empty?"),
    ]
    batch = await create(client, *items, ttl=Duration(seconds=100), concurrency=2)
    assert (batch.item_count, batch.state) == (6, batch_service_pb2.BATCH_STATE_RUNNING)
    found = await results(client, batch.batch_id)
    answer = found[0].answer
    assert (answer.text, [(each.text, list(each.token_ids)) for each in answer.candidates]) == (
        "A cat.",
        [("A cat.", [0, 1])],
    )
    started = answer.started
    assert (started.model, started.prompt_token_count, list(started.prompt_token_ids)) == ("scripted", 3, [1, 2, 3])
    assert started.request_id.endswith(".0")
    assert found[0].answer.finished.receipts[0].media_digest == digest_of(CAT)
    assert found[0].answer.finished.finish_reason == STOP
    errors = {index: found[index].error for index in range(1, 6)}
    assert {index: error.reason for index, error in errors.items()} == {
        1: "PROMPT_TOO_LONG",
        2: "MEDIA_NOT_FOUND",
        3: "INVALID_REQUEST",
        4: "EMPTY_MESSAGE",
        5: "MEDIA_UNREADABLE",
    }
    assert (errors[1].code, errors[1].message, errors[2].code) == (3, "Too long.", 5)
    assert [errors[index].field for index in (1, 3, 5)] == [
        "messages",
        f"{PLACE}.digest",
        PLACE,
    ]
    assert (errors[2].resource, errors[2].field) == ("0" * 64, "")
    done = await get(client, batch.batch_id)
    assert (done.state, done.succeeded_count, done.failed_count) == (batch_service_pb2.BATCH_STATE_DONE, 1, 5)
    assert 90 <= done.expire_time.seconds - done.create_time.seconds <= 110


async def test_a_batch_s_item_has_all_its_candidates(client: Client) -> None:
    client.llm.candidates = [("one", RESULT(mean_logprob=-2.0)), ("two", RESULT(mean_logprob=-1.0))]
    request = chat_request("Hi", return_token_ids=True, generation_config=GENERATION(top_logprobs=1))
    found = await results(client, (await create(client, request)).batch_id)
    answer = found[0].answer
    assert (answer.text, answer.finished.best_candidate_index) == ("two", 1)
    assert [(each.text, list(each.token_ids)) for each in answer.candidates] == [("one", [0, 0]), ("two", [1, 1])]
    assert [[logprob.token_id for logprob in each.logprobs] for each in answer.candidates] == [[0, 0], [1, 1]]
    assert [each.mean_logprob for each in answer.finished.candidates] == [-2.0, -1.0]


async def test_an_answer_too_large_for_a_message_fails_alone(client: Client) -> None:
    client.llm.deltas = ["x" * (1 << 20)] * 9
    found = await results(client, (await create(client, chat_request("Hi"))).batch_id)
    assert (found[0].error.reason, found[0].error.field) == ("INVALID_GENERATION_CONFIG", "generation_config")


async def test_a_batch_outlives_the_gateway_that_began_it(tmp_path: Path, redis_url: str) -> None:
    async with running(tmp_path, redis_url, drain_grace_s=0) as client:
        client.llm.gate = asyncio.Event()
        batch = await create(client, chat_request(DOG, "One?"), chat_request("Two?"))
        async with asyncio.timeout(20):
            while len(client.llm.requests) < 2:
                await asyncio.sleep(0.01)
    async with running(tmp_path, redis_url) as client:
        found = await results(client, batch.batch_id)
        assert {index: result.answer.text for index, result in found.items()} == {0: "A cat.", 1: "A cat."}
        assert client.vision.known == {digest_of(DOG): DOG}


async def test_a_batch_that_is_cancelled_ends(client: Client) -> None:
    client.llm.gate = asyncio.Event()
    batch = await create(client, chat_request("One?"))
    ended = await client.batches.CancelBatch(batch_service_pb2.CancelBatchRequest(batch_id=batch.batch_id))
    assert ended.batch.state == batch_service_pb2.BATCH_STATE_CANCELLED
    assert await results(client, batch.batch_id) == {}


async def test_items_have_request_ids_of_their_own(client: Client) -> None:
    request = batch_service_pb2.CreateBatchRequest(items=[chat_request("a"), chat_request("b")])
    made = await client.batches.CreateBatch(request, metadata=(("x-request-id", "mine"),), timeout=20)
    await results(client, made.batch.batch_id)
    assert sorted(client.llm.calls) == [("mine.0", None), ("mine.1", None)]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (batch_service_pb2.CreateBatchRequest(), "items"),
        (batch_service_pb2.CreateBatchRequest(items=[chat_request("x")] * 4), "items"),
        (batch_service_pb2.CreateBatchRequest(items=[chat_request("x" * 1001)]), "items"),
        (
            batch_service_pb2.CreateBatchRequest(items=[chat_request("x"), chat_request("x", conversation_id="c")]),
            "items[1].conversation_id",
        ),
        (batch_service_pb2.CreateBatchRequest(items=[chat_request("x")], concurrency=-1), "concurrency"),
        (batch_service_pb2.CreateBatchRequest(items=[chat_request("x")], ttl=Duration()), "ttl"),
    ],
)
async def test_a_batch_that_cannot_be_is_refused(
    tmp_path: Path, redis_url: str, request_: batch_service_pb2.CreateBatchRequest, field: str
) -> None:
    async with running(tmp_path, redis_url, max_batch_items=3, max_batch_bytes=1000) as client:
        error = await error_of(client.batches.CreateBatch(request_))
        assert (error.reason, error.field) == ("INVALID_REQUEST", field)


async def test_an_unknown_batch_has_its_reason(client: Client) -> None:
    for call in (
        client.batches.GetBatch(batch_service_pb2.GetBatchRequest(batch_id="a" * 32)),
        client.batches.CancelBatch(batch_service_pb2.CancelBatchRequest(batch_id="x")),
        client.batches.StreamResults(batch_service_pb2.StreamResultsRequest(batch_id="a" * 32)).read(),
    ):
        assert (await error_of(call)).reason == "BATCH_NOT_FOUND"


async def test_without_a_store_there_are_no_batches(tmp_path: Path) -> None:
    async with running(tmp_path) as client:
        call = client.batches.CreateBatch(batch_service_pb2.CreateBatchRequest(items=[chat_request("Hi")]))
        assert (await error_of(call)).reason == "STORE_UNAVAILABLE"


async def test_an_answer_lost_on_the_way_is_asked_for_again(client: Client) -> None:
    client.llm.errors = [LlmUnavailable("Lost.")] * 8  # more than one chat's own tries
    found = await results(client, (await create(client, chat_request("Hi"))).batch_id)
    assert found[0].answer.text == "A cat."


# Media without a question.

UNKNOWN = b"never uploaded"


def picture(content: bytes = DOG, **options: Any) -> content_pb2.Media:
    return content_pb2.Media(inline=content, options=embedding_pb2.PreprocessOptions(**options))


def uploaded(content: bytes, **options: Any) -> content_pb2.Media:
    return content_pb2.Media(digest=digest_of(content), options=embedding_pb2.PreprocessOptions(**options))


async def prefetched(client: Client, *media: content_pb2.Media) -> dict[int, media_service_pb2.PrefetchResponse]:
    call = client.media.Prefetch(media_service_pb2.PrefetchRequest(media=media), timeout=20)
    return {response.index: response async for response in call}


async def estimated(client: Client, media: content_pb2.Media) -> media_service_pb2.EstimateResponse:
    answer = await client.media.Estimate(media_service_pb2.EstimateRequest(media=media))
    assert isinstance(answer, media_service_pb2.EstimateResponse)
    return answer


async def failure_of(call: Awaitable[Any]) -> str:
    """Return the reason, or nothing where there is none."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error, LlmUnavailable).reason
    return ""


async def test_a_question_about_prefetched_media_finds_them_encoded(client: Client) -> None:
    await client.upload(digest_of(CAT), CAT[: 1 << 20], CAT[1 << 20 :])
    clip = video(DOG, segment_count=2)
    responses = await prefetched(client, uploaded(CAT, max_tiles=6), clip)
    cat, dog = responses[0].receipt, responses[1].receipt
    assert (cat.media_digest, cat.tile_count, cat.columns, cat.rows, cat.token_count) == (digest_of(CAT), 3, 2, 1, 768)
    assert [receipt.cache_tier for receipt in (cat, dog)] == [embedding_pb2.CACHE_TIER_NONE] * 2
    assert (len(dog.frames), dog.transfer_tier) == (2, embedding_pb2.CACHE_TIER_UNSPECIFIED)
    assert all(header.prefetch for header in client.vision.headers)
    client.vision.headers.clear()
    events = await client.ask(uploaded(CAT, max_tiles=6), clip, "What?")
    assert [receipt.cache_tier for receipt in events[-1].finished.receipts] == [embedding_pb2.CACHE_TIER_STORE] * 2
    assert [(header.prefetch, header.options) for header in client.vision.headers] == [
        (False, embedding_pb2.PreprocessOptions(max_tiles=6)),
        (False, clip.options),
    ]


async def test_each_medium_s_failure_is_its_own(client: Client) -> None:
    responses = await prefetched(client, uploaded(UNKNOWN), picture(), picture(b""), video(segment_count=0))
    assert responses[1].receipt.media_digest == digest_of(DOG)
    errors = [responses[index].error for index in (0, 2, 3)]
    assert [(error.code, error.reason, error.field, error.resource) for error in errors] == [
        (5, "MEDIA_NOT_FOUND", "", digest_of(UNKNOWN)),
        (3, "MEDIA_UNREADABLE", "media[2]", ""),
        (3, "INVALID_REQUEST", "media[3].options.video.segment_count", ""),
    ]


async def test_what_the_vision_service_refuses_has_its_place(client: Client) -> None:
    client.vision.error = InvalidRequest("Too many.", field="header.options.max_tiles")
    responses = await prefetched(client, picture(max_tiles=9000))
    assert (responses[0].error.field, responses[0].error.message) == ("media[0].options.max_tiles", "Too many.")


@pytest.mark.parametrize(
    ("media", "field"),
    [
        ([], "media"),
        ([picture()] * 1001, "media"),
        ([picture(), content_pb2.Media()], "media[1]"),
        ([content_pb2.Media(digest="cat.jpg")], "media[0].digest"),
    ],
)
async def test_what_cannot_be_prefetched_is_refused(client: Client, media: list[Any], field: str) -> None:
    call = client.media.Prefetch(media_service_pb2.PrefetchRequest(media=media))
    error = await error_of(call.read())
    assert (error.reason, error.field) == ("INVALID_REQUEST", field)
    assert client.vision.calls == []


async def test_an_estimate_is_made_of_what_comes_along_or_was_uploaded(client: Client) -> None:
    found = await estimated(client, picture(max_tiles=6))
    assert (found.width, found.height, found.columns, found.rows) == (640, 480, 4, 3)
    assert (found.tile_count, found.token_count) == (13, 3328)
    await client.upload(digest_of(CAT), CAT[: 1 << 20], CAT[1 << 20 :])
    await estimated(client, uploaded(CAT))
    client.vision.header_bytes = 1 << 20
    await estimated(client, uploaded(CAT))
    sent = [(len(request.content), request.options.max_tiles) for request in client.vision.estimates]
    assert sent == [(len(DOG), 6), (64 << 10, 0), (64 << 10, 0), (len(CAT), 0)]
    assert client.vision.headers == []


async def test_an_estimate_that_cannot_be_made_has_its_reason(client: Client) -> None:
    missing = await error_of(estimated(client, uploaded(UNKNOWN)))
    assert (missing.reason, missing.resource) == ("MEDIA_NOT_FOUND", digest_of(UNKNOWN))
    client.vision.header_bytes = 1 << 20
    unreadable = await error_of(estimated(client, picture()))
    assert (unreadable.reason, unreadable.field) == ("MEDIA_UNREADABLE", "media")
    client.vision.error = InvalidRequest("No video.", field="options.video")
    assert (await error_of(estimated(client, video()))).field == "media.options.video"
    assert (await error_of(estimated(client, content_pb2.Media()))).field == "media"


async def test_a_picture_too_large_for_a_message_is_not_sent_for_an_estimate(tmp_path: Path, redis_url: str) -> None:
    async with running(tmp_path, redis_url, max_message_bytes=2 << 20) as client:
        large = bytes(3 << 20)
        await client.upload(
            digest_of(large), *(large[start : start + (1 << 20)] for start in range(0, 3 << 20, 1 << 20))
        )
        client.vision.header_bytes = 1 << 20
        assert (await error_of(estimated(client, uploaded(large)))).reason == "MEDIA_UNREADABLE"


async def test_a_medium_is_deleted_with_its_embeddings(client: Client) -> None:
    await client.upload(digest_of(DOG), DOG)
    await client.ask(uploaded(DOG), "What?")
    request = media_service_pb2.DeleteMediumRequest(digest=digest_of(DOG))
    assert (await client.media.DeleteMedium(request)).embedding_count == 1
    assert (await client.media.DeleteMedium(request)).embedding_count == 0
    assert client.vision.erased == [("", digest_of(DOG))] * 2
    missing = client.media.FindMissing(media_service_pb2.FindMissingRequest(digests=[digest_of(DOG)]))
    assert list((await missing).missing_digests) == [digest_of(DOG)]
    error = await error_of(client.chat.Chat(chat_request(uploaded(DOG), "What?")).read())
    assert (error.reason, error.resource) == ("MEDIA_NOT_FOUND", digest_of(DOG))


async def test_a_gateway_forgets_a_medium_that_another_deletes(client: Client, redis_url: str) -> None:
    await client.upload(digest_of(DOG), DOG)
    async with redis_of(redis_url) as redis:
        await RedisMediaStore(redis, ttl_s=60).delete(digest_of(DOG))
    async with asyncio.timeout(20):
        while await failure_of(estimated(client, uploaded(DOG))) != "MEDIA_NOT_FOUND":
            await asyncio.sleep(0.01)


async def test_what_cannot_be_deleted_has_its_reason(client: Client, tmp_path: Path) -> None:
    error = await error_of(client.media.DeleteMedium(media_service_pb2.DeleteMediumRequest(digest="cat.jpg")))
    assert (error.reason, error.field) == ("INVALID_REQUEST", "digest")
    await client.vision_stage.server.stop(None)
    request = media_service_pb2.DeleteMediumRequest(digest=digest_of(DOG))
    assert (await error_of(client.media.DeleteMedium(request))).reason == "VISION_UNAVAILABLE"


async def test_without_a_store_nothing_can_be_deleted(tmp_path: Path) -> None:
    async with running(tmp_path) as client:
        request = media_service_pb2.DeleteMediumRequest(digest=digest_of(DOG))
        assert (await error_of(client.media.DeleteMedium(request))).reason == "STORE_UNAVAILABLE"
