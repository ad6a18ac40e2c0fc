"""What HTTP refuses: the status, the reason, the field; never a library's words."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.http import Bounds
from gateway.http.problems import problem_of
from gateway.http.turns import Place, param_of
from shared.errors import ApiKeyInvalid, InvalidRequest, MediaNotFound, ServiceError, reasons
from tests.gateway.fakes_gateway import CAT, gateway_without_redis
from tests.gateway.http.edge import CHAT, MODELS, TOKENIZE, Edge, edge_over, error_of, picture, words

JSON = {"content-type": "application/json"}
LIBRARY_WORDS = ("pydantic", "Input should", "Traceback", "errors.pydantic", "fastapi", "starlette", "h11", "line 1")


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with edge_over(gateway_without_redis()) as edge:
        yield edge


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temprature": 1}, "temprature"),
        ({"max_tokens": "1"}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 17}, "n"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"seed": -1}, "seed"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "x"}]}, "messages[1]"),
    ],
)
async def test_a_value_that_is_not_allowed_is_named(edge: Edge, body: dict[str, Any], param: str) -> None:
    response = await edge.chat("Hi", **body)
    status, code, named = error_of(response)
    assert (status, named) == (400, param)
    assert code is not None
    assert code in reasons()
    assert not any(word in response.text for word in LIBRARY_WORDS)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b'{"messages": NaN}',
        b"[" * 100_000,
        b'{"messages":' * 5000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b"[" + b"[]," * 600_000 + b"[]]",
    ],
)
async def test_a_body_that_is_no_json_object_is_refused(edge: Edge, content: bytes) -> None:
    for path in (CHAT, TOKENIZE):
        response = await edge.client.post(path, content=content, headers=JSON)
        assert error_of(response)[:2] == (400, "INVALID_REQUEST")
        assert not any(word in response.text for word in LIBRARY_WORDS)


async def test_a_body_of_another_type_is_not_read(edge: Edge) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        response = await edge.client.post(CHAT, content=b'{"messages": []}', headers={"content-type": kind})
        assert error_of(response)[:2] == (415, "INVALID_REQUEST")


async def test_a_number_too_large_for_json_is_refused(edge: Edge) -> None:
    for text in (
        b'"temperature": 1e999',
        b'"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": 1e999}}}',
    ):
        content = b'{"messages": [{"role": "user", "content": "x"}], ' + text + b"}"
        assert error_of(await edge.client.post(CHAT, content=content, headers=JSON))[0] == 400


async def test_the_model_is_asked_for_by_its_name_or_not_at_all(edge: Edge) -> None:
    for name in ("InternVL3-8B", "OpenGVLab/InternVL3-8B", None, ""):
        assert (await edge.chat("Hi", model=name)).status_code == 200
    for name in ("gpt-4o", "InternVL3-8B/x", "internvl3-8b"):
        assert await edge.error("Hi", model=name) == (404, "MODEL_NOT_FOUND", "model")
    assert edge.facts.descriptions == 1


async def test_what_is_nowhere_is_not_found(edge: Edge) -> None:
    for path in ("/v1", "/v1/", "/v1/chat", "/v2/models", "/v1/chat/completions/", "/V1/models"):
        assert error_of(await edge.client.get(path))[0] == 404, path
    response = await edge.client.delete(MODELS)
    assert (error_of(response)[0], response.headers["allow"]) == (405, "GET")


async def test_a_body_has_a_largest_size_whether_it_is_announced_or_not() -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 2000}]}).encode()

    async def in_pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    async with edge_over(gateway_without_redis(), bounds=Bounds(body_bytes=1000)) as edge:
        assert error_of(await edge.client.post(CHAT, content=body, headers=JSON))[:2] == (413, "INVALID_REQUEST")
        assert error_of(await edge.client.post(CHAT, content=in_pieces(), headers=JSON))[0] == 413
        assert edge.gateway.llm.requests == []
        assert (await edge.chat("Hi")).status_code == 200


async def test_all_bodies_together_have_a_largest_size() -> None:
    async with edge_over(gateway_without_redis(), bounds=Bounds(total_body_bytes=500)) as edge:
        response = await edge.chat("x" * 600)
        assert error_of(response)[:2] == (429, "QUEUE_FULL")
        assert "retry-after" in response.headers
        for _ in range(3):  # what was held is given back
            assert (await edge.chat("x" * 300)).status_code == 200


async def test_errors_of_a_turn_name_the_field_of_the_body(edge: Edge) -> None:
    system = {"role": "system", "content": "Be brief."}
    empty = {"role": "user", "content": [words(""), words("")]}
    assert await edge.error("", messages=[system, empty]) == (400, "EMPTY_MESSAGE", "messages[1].content")
    cat = {"type": "image_url", "image_url": {"url": f"ivl:sha256:{'ab' * 32}"}}
    found = await edge.error("", messages=[system, {"role": "user", "content": [words("What?"), cat]}])
    assert found == (404, "MEDIA_NOT_FOUND", "ab" * 32)
    none = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    found = await edge.error("", messages=[system, {"role": "user", "content": [words("What?"), none]}])
    assert found == (400, "MEDIA_UNREADABLE", "messages[1].content[1]")


def test_fields_of_the_gateway_have_names_in_the_body() -> None:
    places = (Place(1, (2, 0)), Place(2), Place(3, (0,)))
    named = {
        "messages[0].parts[1].media": "messages[1].content[0]",
        "messages[0].parts[0].media.options": "messages[1].content[2]",
        "messages[1].role": "messages[2].content",
        "messages[9].role": "messages[9].role",
        "messages": "messages",
        "generation_config.max_output_tokens": "max_tokens",
        "generation_config.temperature": "temperature",
        "tools[3].parameters_json_schema": "tools[3].function.parameters",
        "system_message": "messages[0]",
        "text": "prompt",
    }
    assert {field: param_of(field, places) for field in named} == named
    assert param_of(None, places) is None


@pytest.mark.parametrize("error_class", reasons().values(), ids=lambda error: error.reason)
def test_every_reason_has_a_status_and_a_type(error_class: type[ServiceError]) -> None:
    problem = problem_of(error_class("Words of ours."))
    assert 400 <= problem.status <= 504
    assert problem.body["error"]["code"] == error_class.reason
    assert ("retry-after" in problem.headers) == (problem.status in (429, 503))


def test_statuses_are_those_that_clients_know() -> None:
    assert problem_of(InvalidRequest("x", field="f")).param == "f"
    assert problem_of(MediaNotFound("x", resource="r")).status == 404
    problem = problem_of(ApiKeyInvalid("x"))
    assert (problem.status, problem.headers["www-authenticate"]) == (401, "Bearer")


async def test_too_many_media_are_refused_before_any_is_fetched() -> None:
    class Fetcher:
        async def fetch(self, url: str, field: str) -> bytes:
            raise AssertionError(url)

    urls = [{"type": "image_url", "image_url": {"url": f"https://a.example/{number}"}} for number in range(5)]
    async with edge_over(gateway_without_redis(), bounds=Bounds(remote_media=4), remote=Fetcher()) as edge:
        assert await edge.error(*urls) == (400, "INVALID_REQUEST", "messages")


async def test_tokens_of_a_text_and_of_a_dialogue_are_told(edge: Edge) -> None:
    text = await edge.client.post(TOKENIZE, json={"prompt": "Hello", "add_special_tokens": True})
    assert text.json() == {"count": 5, "max_model_len": 4096, "tokens": [0, 1, 2, 3, 4], "token_strs": None}
    body = {"messages": [{"role": "user", "content": [words("What?"), picture(CAT)]}], "add_generation_prompt": True}
    assert (await edge.client.post(TOKENIZE, json=body)).json()["tokens"] == [7, 8, 9]
    assert edge.gateway.vision.encodes == [CAT]
    assert error_of(await edge.client.post(TOKENIZE, json={"prompt": 5})) == (400, "INVALID_REQUEST", "prompt")


async def test_the_one_model_is_listed_and_described(edge: Edge) -> None:
    [model] = (await edge.client.get(MODELS)).json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("InternVL3-8B", "model", 4096)
    assert (await edge.client.get(f"{MODELS}/OpenGVLab/InternVL3-8B")).json() == model
    assert error_of(await edge.client.get(f"{MODELS}/other"))[1] == "MODEL_NOT_FOUND"
