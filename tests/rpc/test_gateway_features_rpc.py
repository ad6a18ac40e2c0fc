"""Videos, candidates, critics, tools and batches through the gateway as a server, between real channels."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from gateway.settings import GatewaySettings
from internvl_serving.common.v1 import embedding_pb2, generation_pb2
from internvl_serving.gateway.v1 import batch_service_pb2, chat_service_pb2, content_pb2, conversation_service_pb2
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
