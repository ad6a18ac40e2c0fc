"""Chat completions: what a body asks of the model, and what comes back, whole and as a stream."""

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.content import MediaPart, Message, PreprocessOptions, Role, TextPart, ToolCall
from gateway.events import (
    CandidateResult,
    Delta,
    FinishReason,
    Generated,
    GenerateRequest,
    TokenLogprob,
    TokenUsage,
)
from gateway.http.answers import ChatCompletion
from gateway.http.requests import ChatCompletionRequest
from gateway.http.turns import Turn, turn_of
from shared.digest import digest_of
from shared.errors import InvalidRequest, LlmUnavailable, MediaUnreadable, QueueFull
from tests.gateway.fakes_gateway import CAT, DOG, STARTED, Script, answer_of, gateway_without_redis
from tests.gateway.http.edge import CHAT, Edge, data_url, edge_over, error_of, events_of, picture, words

USAGE = TokenUsage(prompt_tokens=300, visual_tokens=256, cached_tokens=32, output_tokens=5)
CALL = ToolCall("weather", '{"city": "Bern"}')


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with edge_over(gateway_without_redis()) as edge:
        yield edge


def turn(*messages: Any, **body: Any) -> Turn:
    return turn_of(ChatCompletionRequest.model_validate({"messages": list(messages)} | body), {})


def said(*messages: Any, **body: Any) -> tuple[Message, ...]:
    return turn(*messages, **body).request.messages


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def script(*deltas: Delta, **generated: Any) -> Script:
    return [STARTED, *deltas, Generated(**({"finish_reason": FinishReason.STOP, "usage": USAGE} | generated))]


async def asked(edge: Edge, **body: Any) -> GenerateRequest:
    response = await edge.chat("Hi", **body)
    assert response.status_code == 200, response.text
    llm = edge.gateway.llm
    return llm.requests[-1]


async def test_an_answer_is_a_completion_with_usage_and_receipts() -> None:
    async with edge_over(gateway_without_redis(script(Delta("A "), Delta("cat.")))) as edge:
        response = await edge.chat(words("What is it?"), picture(CAT))
    completion = ChatCompletion.model_validate(response.json(), strict=True)
    assert response.headers["content-type"] == "application/json"
    assert (completion.model, completion.choices[0].message.content) == ("fake", "A cat.")
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.model_dump() == {
        "prompt_tokens": 300,
        "completion_tokens": 5,
        "total_tokens": 305,
        "prompt_tokens_details": {"cached_tokens": 32},
    }
    assert completion.internvl.visual_tokens == 256
    assert [receipt.media_digest for receipt in completion.internvl.receipts] == [digest_of(CAT)]
    assert completion.id == f"chatcmpl-{response.headers['x-request-id']}"


async def test_a_stream_brings_the_same_in_pieces_and_ends_with_done() -> None:
    async with edge_over(gateway_without_redis(script(Delta("A "), Delta("cat.")))) as edge:
        response = await edge.chat("What is it?", stream=True)
    *chunks, last = events_of(response.text)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert last == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "A "},
        {"content": "cat."},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert ["internvl" in chunk for chunk in chunks] == [False, False, False, True]
    assert {chunk["id"] for chunk in chunks} == {f"chatcmpl-{response.headers['x-request-id']}"}
    assert not any("usage" in chunk for chunk in chunks)


async def test_usage_comes_in_a_chunk_of_its_own_where_it_is_asked_for() -> None:
    async with edge_over(gateway_without_redis(script(Delta("A cat.")))) as edge:
        response = await edge.chat("What?", stream=True, stream_options={"include_usage": True})
    *chunks, last, _ = events_of(response.text)
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert (last["choices"], last["usage"]["total_tokens"], "internvl" in last) == ([], 305, True)


async def test_every_choice_has_its_own_text_and_end() -> None:
    results = (CandidateResult(FinishReason.STOP, 2), CandidateResult(FinishReason.LENGTH, 3))
    deltas = (Delta("A", candidate_index=1), Delta("B"), Delta("C", candidate_index=1))
    async with edge_over(
        gateway_without_redis(script(*deltas, candidates=results), script(*deltas, candidates=results))
    ) as edge:
        whole = (await edge.chat("Hi", n=2)).json()
        stream = events_of((await edge.chat("Hi", n=2, stream=True)).text)
        assert edge.gateway.llm.requests[0].config.candidate_count == 2
    assert [(each["message"]["content"], each["finish_reason"]) for each in whole["choices"]] == [
        ("B", "stop"),
        ("AC", "length"),
    ]
    streamed = [chunk["choices"][0] for chunk in stream[:-1]]
    assert "".join(each["delta"].get("content", "") for each in streamed if each["index"] == 1) == "AC"
    assert [each["index"] for each in streamed if each["delta"].get("role")] == [0, 1]
    assert [each["finish_reason"] for each in streamed[-2:]] == ["stop", "length"]


async def test_calls_of_tools_come_as_calls() -> None:
    result = CandidateResult(FinishReason.TOOL_CALLS, 9, tool_calls=(CALL,))
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    scripts = [script(finish_reason=FinishReason.TOOL_CALLS, candidates=(result,)) for _ in range(2)]
    async with edge_over(gateway_without_redis(*scripts)) as edge:
        choice = (await edge.chat("Weather?", tools=tools)).json()["choices"][0]
        chunks = events_of((await edge.chat("Weather?", tools=tools, stream=True)).text)
        [tool] = edge.gateway.llm.requests[0].prompt.tools
    assert (tool.name, tool.parameters_json_schema) == ("weather", '{"type": "object"}')
    [call] = choice["message"]["tool_calls"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Bern"}'}
    [streamed] = [
        chunk["choices"][0]["delta"]["tool_calls"]
        for chunk in chunks[:-1]
        if "tool_calls" in str(chunk["choices"][0]["delta"])
    ]
    assert (streamed[0]["index"], streamed[0]["function"]["name"]) == (0, "weather")


async def test_tools_that_must_not_be_called_are_not_offered(edge: Edge) -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    assert (await asked(edge, tools=tools, tool_choice="none")).prompt.tools == ()
    assert len((await asked(edge, tools=tools, tool_choice="auto")).prompt.tools) == 1


async def test_log_probabilities_are_told_with_their_bytes() -> None:
    token = TokenLogprob(5, "ü".encode()[:1], -0.5, (TokenLogprob(6, b"u", float("-inf")),))
    scripts = [script(Delta("ü", logprobs=(token,))) for _ in range(2)]
    async with edge_over(gateway_without_redis(*scripts)) as edge:
        whole = (await edge.chat("Hi", logprobs=True, top_logprobs=1)).json()
        chunks = events_of((await edge.chat("Hi", logprobs=True, top_logprobs=1, stream=True)).text)
        assert edge.gateway.llm.requests[0].config.top_logprobs == 1
    [told] = whole["choices"][0]["logprobs"]["content"]
    assert (told["token"], told["bytes"], told["logprob"]) == ("\ufffd", [0xC3], -0.5)
    assert told["top_logprobs"] == [{"token": "u", "logprob": -9999.0, "bytes": [117]}]
    assert chunks[1]["choices"][0]["logprobs"]["content"] == [told]


async def test_every_wish_reaches_the_model(edge: Edge) -> None:
    config = (
        await asked(
            edge,
            max_tokens=3,
            max_completion_tokens=5,
            temperature=0,
            top_p=0.5,
            top_k=-1,
            min_p=0.1,
            repetition_penalty=1.5,
            seed=7,
            stop=["a", "b"],
            logprobs=True,
            ignore_eos=True,
            skip_special_tokens=False,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}},
        )
    ).config
    assert (config.max_output_tokens, config.temperature, config.top_p, config.top_k) == (5, 0, 0.5, 0)
    assert (config.min_p, config.repetition_penalty, config.seed) == (0.1, 1.5, 7)
    assert (config.stop_sequences, config.top_logprobs, config.json_schema) == (("a", "b"), 0, '{"type": "integer"}')
    assert (config.ignore_end, config.include_special_tokens) == (True, True)


async def test_what_is_not_said_is_as_openai_has_it(edge: Edge) -> None:
    config = (await asked(edge)).config
    assert (config.temperature, config.max_output_tokens, config.top_logprobs) == (1.0, None, None)


def test_any_json_object_is_a_schema() -> None:
    assert turn(user("Hi"), response_format={"type": "json_object"}).request.config.json_schema == '{"type":"object"}'


def test_media_behind_a_text_are_read_before_it_and_every_other_order_stays() -> None:
    cat, dog = picture(CAT), picture(DOG)

    def order(*content: Any) -> list[str]:
        [message] = said(user(*content))
        return [part.text if isinstance(part, TextPart) else "picture" for part in message.parts]

    assert order(words("What?"), cat, dog) == ["picture", "picture", "What?"]
    assert order(cat, words("What?")) == ["picture", "What?"]
    assert order(words("First:"), cat, words("Second:"), dog) == ["First:", "picture", "Second:", "picture"]


@pytest.mark.parametrize(
    ("asked_for", "body", "max_tiles"),
    [
        ({}, {}, None),
        ({"detail": "auto"}, {}, None),
        ({"detail": "low"}, {}, 1),
        ({"detail": "high"}, {}, 24),
        ({"max_dynamic_patch": 6, "detail": "low"}, {}, 6),
        ({}, {"mm_processor_kwargs": {"max_dynamic_patch": 4}}, 4),
        ({"detail": "low"}, {"mm_processor_kwargs": {"max_dynamic_patch": 4}}, 1),
    ],
)
def test_detail_is_a_number_of_tiles(asked_for: dict[str, Any], body: dict[str, Any], max_tiles: int | None) -> None:
    [message] = said(user(picture(CAT, **asked_for)), **body)
    assert message.media[0].options == PreprocessOptions(max_tiles)


def test_a_video_is_a_medium_of_so_many_frames() -> None:
    video = {"type": "video_url", "video_url": {"url": data_url(CAT, "video/mp4")}}
    [message] = said(user(video), media_io_kwargs={"video": {"num_frames": 4}})
    options = message.media[0].options.video
    assert options is not None
    assert (options.segment_count, message.media[0].content) == (4, CAT)


def test_a_medium_that_was_sent_before_is_named_by_its_digest() -> None:
    digest = digest_of(CAT)
    [message] = said(user({"type": "image_url", "image_url": {"url": f"ivl:sha256:{digest}"}}))
    assert isinstance(message.parts[0], MediaPart)
    assert (message.media[0].digest, message.media[0].content) == (digest, None)


def test_bytes_of_any_length_come_out_as_they_went_in() -> None:
    for length in (1, 2, 3, 786_432, 786_433, 2_000_001):
        content = bytes(range(256)) * (length // 256) + bytes(length % 256)
        [message] = said(user(picture(content)))
        assert message.media[0].content == content


@pytest.mark.parametrize(
    "url", ["data:image/png,abc", "data:", "data:image/png;base64", f"data:{'x' * 300};base64,QQ=="]
)
def test_a_data_url_has_one_form(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        said(user(words("Hi"), {"type": "image_url", "image_url": {"url": url}}))
    assert caught.value.field == "messages[0].content[1].image_url.url"


@pytest.mark.parametrize("payload", ["Q", "QQ=", "Q Q==", "QQ==QQ==", "ü", "Q\nQ=="])
def test_what_is_no_base64_is_refused(payload: str) -> None:
    with pytest.raises(MediaUnreadable):
        said(user({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{payload}"}}))


def test_a_dialogue_keeps_its_roles_and_its_system_message() -> None:
    request = turn(
        {"role": "system", "content": [words("Be "), words("brief.")]},
        user("Hi"),
        {"role": "assistant", "content": "Hello.", "refusal": None},
        user("Bye"),
    ).request
    assert request.system_message == "Be brief."
    assert [message.role for message in request.messages] == [Role.USER, Role.ASSISTANT, Role.USER]
    assert [message.text for message in request.messages] == ["Hi", "Hello.", "Bye"]


def test_results_of_tools_are_read_in_the_order_of_the_calls() -> None:
    calls = [{"id": name, "type": "function", "function": {"name": name, "arguments": "{}"}} for name in ("a", "b")]
    answers = [{"role": "tool", "tool_call_id": name, "content": f"of {name}"} for name in ("b", "a")]
    messages = said(user("Hi"), {"role": "assistant", "content": None, "tool_calls": calls}, *answers)
    assert [message.text for message in messages[2:]] == ["of a", "of b"]


@pytest.mark.parametrize("ids", [["c"], ["a", "a"]])
def test_a_result_belongs_to_a_call_right_before(ids: list[str]) -> None:
    calls = [{"id": "a", "type": "function", "function": {"name": "a", "arguments": "{}"}}]
    answers = [{"role": "tool", "tool_call_id": name, "content": "x"} for name in ids]
    with pytest.raises(InvalidRequest) as caught:
        said(user("Hi"), {"role": "assistant", "tool_calls": calls}, *answers)
    assert caught.value.field == f"messages[{len(ids) + 1}].tool_call_id"


async def test_an_error_before_the_first_token_has_a_status_of_its_own_in_a_stream_too() -> None:
    for stream in (False, True):
        async with edge_over(gateway_without_redis([QueueFull("Full.", retry_after_s=1.2)])) as edge:
            response = await edge.chat("Hi", stream=stream)
        assert error_of(response) == (429, "QUEUE_FULL", None)
        assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("2", "1200")


async def test_a_stream_that_breaks_says_so_and_is_not_done() -> None:
    async with edge_over(gateway_without_redis([STARTED, Delta("A "), LlmUnavailable("Gone.")])) as edge:
        response = await edge.chat("Hi", stream=True)
        code = {"rpc": "Http/ChatCompletions", "code": "UNAVAILABLE"}
        await edge.settled()
        assert edge.registry.value("internvl_rpc_finished_total", **code) == 1
    events = events_of(response.text)
    assert "[DONE]" not in events
    assert events[-1]["error"] == {
        "message": "Gone.",
        "type": "service_unavailable_error",
        "param": None,
        "code": "LLM_UNAVAILABLE",
    }


async def test_a_fault_of_ours_tells_nothing_of_itself() -> None:
    for body in ({}, {"stream": True}):
        async with edge_over(gateway_without_redis([STARTED, Delta("A "), RuntimeError("/secret/path")])) as edge:
            response = await edge.chat("Hi", **body)
        assert "INTERNAL" in response.text
        assert "secret" not in response.text


async def test_two_streams_do_not_wait_for_each_other() -> None:
    gate = asyncio.Event()
    slow: Script = [STARTED, gate, Delta("slow"), Generated(FinishReason.STOP)]
    async with edge_over(gateway_without_redis(slow, answer_of("fast"))) as edge:
        waiting = asyncio.create_task(edge.chat("Hi", stream=True))
        await edge.gateway.llm.waiting.wait()
        assert events_of((await edge.chat("Hi", stream=True)).text)[1]["choices"][0]["delta"]["content"] == "fast"
        gate.set()
        assert events_of((await waiting).text)[-1] == "[DONE]"


async def test_pictures_behind_urls_are_fetched_where_there_is_a_fetcher() -> None:
    class Fetcher:
        async def fetch(self, url: str, field: str) -> bytes:
            return {"https://a.example/cat.png": CAT, "https://a.example/dog.png": DOG}[url]

    urls = ("https://a.example/cat.png", "https://a.example/dog.png", "https://a.example/cat.png")
    async with edge_over(gateway_without_redis(), remote=Fetcher()) as edge:
        response = await edge.chat(*({"type": "image_url", "image_url": {"url": url}} for url in urls))
    receipts = response.json()["internvl"]["receipts"]
    assert [receipt["media_digest"] for receipt in receipts] == [digest_of(CAT), digest_of(DOG), digest_of(CAT)]


async def test_without_a_fetcher_urls_are_refused(edge: Edge) -> None:
    for url in ("https://a.example/cat.png", "http://127.0.0.1/", "file:///etc/passwd", "cat.png", ""):
        found = await edge.error(words("Hi"), {"type": "image_url", "image_url": {"url": url}})
        assert found == (400, "REMOTE_URL_REFUSED", "messages[0].content[1].image_url.url")


async def test_a_large_picture_is_read_beside_the_event_loop(edge: Edge) -> None:
    content = b"\xff\xd8" + bytes(300_000)
    response = await edge.client.post(
        CHAT,
        json={"messages": [user({"type": "image_url", "image_url": {"url": data_url(content)}})]},
    )
    assert response.json()["internvl"]["receipts"][0]["media_digest"] == digest_of(content)
    assert len(base64.b64encode(content)) > 64 << 10
