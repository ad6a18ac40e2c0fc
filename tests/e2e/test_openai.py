"""Clients of OpenAI's API, with the real `openai` package, against real processes."""

import asyncio
import base64
import re
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from deploy.local import LocalStack
from internvl_client import AsyncClient, Client
from tests.e2e.golden_cases import golden_image
from tests.golden_cases import GOLDEN

pytestmark = pytest.mark.e2e
TIGER, POSE = "rgb_landscape.png", "rgb_portrait.png"


@pytest.fixture
async def client(stack: LocalStack) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"http://{stack.http_address}/v1", api_key="none", timeout=120, max_retries=0
    ) as client:
        yield client


def url_of(name: str) -> str:
    return f"data:image/png;base64,{base64.b64encode((GOLDEN / 'images' / name).read_bytes()).decode()}"


def picture(name: str, **more: Any) -> Any:
    return {"type": "image_url", "image_url": {"url": url_of(name), **more}}


def words(text: str) -> Any:
    return {"type": "text", "text": text}


def user(*content: Any) -> Any:
    return {"role": "user", "content": list(content)}


def test_the_snippet_of_the_internvl2_card_runs(stack: LocalStack) -> None:
    # The card's own lines; only where the server is, the key and where the picture comes from differ.
    client = OpenAI(api_key="YOUR_API_KEY", base_url=f"http://{stack.http_address}/v1")
    model_name = client.models.list().data[0].id
    response = client.chat.completions.create(
        model=model_name,
        messages=[
            {
                "role": "user",
                "content": [
                    {
                        "type": "text",
                        "text": "describe this image",
                    },
                    {
                        "type": "image_url",
                        "image_url": {
                            "url": url_of(TIGER),
                        },
                    },
                ],
            }
        ],
        temperature=0.8,
        top_p=0.8,
    )
    assert response.choices[0].message.content is not None
    assert response.choices[0].finish_reason in ("stop", "length")
    assert response.model == model_name


async def test_greedy_text_and_token_counts_are_those_of_grpc(client: openai.AsyncOpenAI, stack: LocalStack) -> None:
    with Client(stack.address, timeout_s=120) as ours:
        theirs = ours.ask(golden_image(TIGER, 6), "What is it?", max_output_tokens=12)
    completion = await client.chat.completions.create(
        model="any/" + theirs.model,
        messages=[user(words("What is it?"), picture(TIGER, max_dynamic_patch=6))],
        max_completion_tokens=12,
        temperature=0,
    )
    usage = completion.usage
    assert usage is not None
    assert completion.choices[0].message.content == theirs.text
    assert (usage.prompt_tokens, usage.completion_tokens) == (
        theirs.usage.num_prompt_tokens,
        theirs.usage.num_output_tokens,
    )
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens is not None
    [receipt] = (completion.model_extra or {})["internvl"]["receipts"]
    assert (receipt["media_digest"], receipt["tile_count"]) == (
        theirs.receipts[0].media_digest,
        theirs.receipts[0].num_tiles,
    )


async def test_a_dialogue_of_several_turns_and_pictures_is_the_same_streamed(client: openai.AsyncOpenAI) -> None:
    messages: list[Any] = [user(picture(TIGER), words("What is it?"))]
    for question in ([picture(POSE), words("And this?")], [words("Which is larger?")]):
        asked: dict[str, Any] = {"model": "", "messages": messages, "max_tokens": 8, "temperature": 0}
        whole = await client.chat.completions.create(**asked)
        pieces, usages = [], []
        async for chunk in await client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        ):
            pieces += [choice.delta.content or "" for choice in chunk.choices]
            usages.append(chunk.usage)
        assert "".join(pieces) == whole.choices[0].message.content
        assert usages[:-1] == [None] * (len(usages) - 1)
        assert usages[-1] is not None
        assert usages[-1].total_tokens == (whole.usage and whole.usage.total_tokens)
        messages += [whole.choices[0].message, user(*question)]
    assert len(messages) == 5


async def test_tokenize_agrees_with_what_a_prompt_took(client: openai.AsyncOpenAI, stack: LocalStack) -> None:
    messages = [user(picture(POSE, detail="low"), words("What is it?"))]
    answer = await client.chat.completions.create(model="", messages=messages, max_tokens=1, temperature=0)
    http = client.with_options(base_url=f"http://{stack.http_address}")
    told: Any = await http.post("/tokenize", body={"messages": messages}, cast_to=object)
    assert answer.usage is not None
    assert told["count"] == len(told["tokens"]) == answer.usage.prompt_tokens
    plain: Any = await http.post("/tokenize", body={"prompt": "<|im_start|> is text"}, cast_to=object)
    assert 0 < plain["count"] == len(plain["tokens"])


async def test_a_schema_is_followed(client: openai.AsyncOpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    completion = await client.chat.completions.create(
        model="",
        messages=[user(words("One or two?"))],
        max_tokens=32,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    )
    assert re.fullmatch(r'{\s*"n"\s*:\s*[12]\s*}', completion.choices[0].message.content or "")


async def test_choices_and_log_probabilities(client: openai.AsyncOpenAI) -> None:
    completion = await client.chat.completions.create(
        model="",
        messages=[user(words("Hi"))],
        max_tokens=4,
        n=3,
        seed=5,
        logprobs=True,
        top_logprobs=2,
        extra_body={"ignore_eos": True, "top_k": 50},
    )
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    for choice in completion.choices:
        assert choice.logprobs is not None
        tokens = choice.logprobs.content or []
        assert len(tokens) == 4
        assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in tokens)


async def test_sixteen_at_once_give_what_each_gives_alone(client: openai.AsyncOpenAI) -> None:
    async def ask(number: int) -> str | None:
        content = [picture(TIGER)] if number % 4 == 0 else []
        completion = await client.chat.completions.create(
            model="",
            messages=[user(*content, words(f"Question {number}: what do you see?"))],
            max_tokens=4 + number % 5,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        return completion.choices[0].message.content

    together = await asyncio.gather(*map(ask, range(16)))
    assert together == [await ask(number) for number in range(16)]
    assert len(set(together)) > 1


async def test_a_stream_that_is_closed_ends_in_the_engine(client: openai.AsyncOpenAI, stack: LocalStack) -> None:
    stream = await client.chat.completions.create(
        model="",
        messages=[user(words("Tell me everything."))],
        max_tokens=200,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    async for _ in stream:
        break
    request_id = stream.response.headers["x-request-id"]
    await stream.close()
    # The answers that follow would wait for the one that was left if it still ran to its end.
    await client.chat.completions.create(model="", messages=[user(words("Hi"))], max_tokens=1)
    while not (ends := codes_of(stack, "llm", request_id)):
        await asyncio.sleep(0.05)
    assert ends == codes_of(stack, "gateway", request_id) == ["CANCELLED"]


def codes_of(stack: LocalStack, part: str, request_id: str) -> list[str]:
    """Return how the calls of a request ended, as a service's log has it."""
    lines = stack.processes[part].log_file.read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if request_id in line and '"call_finished"' in line]
    return [match[1] for line in found if (match := re.search(r'"code": ?"(\w+)"', line))]


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"model": "gpt-4o"}, 404, "MODEL_NOT_FOUND", "model"),
        ({"max_tokens": -1}, 400, "INVALID_REQUEST", "max_tokens"),
        ({"max_tokens": 10**9}, 400, "INVALID_GENERATION_CONFIG", "max_tokens"),
        ({"stop": ["x" * 1000]}, 400, "INVALID_GENERATION_CONFIG", "stop"),
        (
            {"messages": [user({"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}})]},
            400,
            "MEDIA_UNREADABLE",
            "messages[0].content[0]",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
            400,
            "INVALID_JSON_SCHEMA",
            "response_format",
        ),
    ],
)
async def test_what_is_refused_says_why(
    client: openai.AsyncOpenAI, body: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    asked: Any = {"model": "", "messages": [user(words("Hi"))]} | body
    with pytest.raises(openai.APIStatusError) as caught:
        await client.chat.completions.create(**asked)
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert param is None or caught.value.param == param
    assert caught.value.request_id


async def test_http_and_grpc_share_what_they_have_seen(client: openai.AsyncOpenAI, stack: LocalStack) -> None:
    completion = await client.chat.completions.create(
        model="", messages=[user(picture(POSE, max_dynamic_patch=3), words("Hi"))], max_tokens=1
    )
    [receipt] = (completion.model_extra or {})["internvl"]["receipts"]
    url = f"ivl:sha256:{receipt['media_digest']}"
    again = await client.chat.completions.create(
        model="",
        messages=[user({"type": "image_url", "image_url": {"url": url, "max_dynamic_patch": 3}}, words("Hi"))],
        max_tokens=1,
    )
    assert (again.model_extra or {})["internvl"]["receipts"][0]["cache_tier"] != "NONE"
    async with AsyncClient(stack.address, timeout_s=60) as ours:
        answer = await ours.ask(golden_image(POSE, 3), "Hi", max_output_tokens=1)
    assert answer.receipts[0].cache_hit
