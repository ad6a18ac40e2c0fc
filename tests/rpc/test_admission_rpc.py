"""What a client reads when it is refused: which budget is used up and when to come back, or that there is no room."""

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2

from gateway.keys import hash_of, new_key
from internvl_client.errors import OverloadedError, error_of
from tests.rpc.scripted_stages import chat_request, running, text_of


def keys_file(tmp_path: Path, **limits: int) -> tuple[Path, list[tuple[str, str]]]:
    """A file with one tenant, and what its calls carry."""
    key, file = new_key(), tmp_path / "keys.json"
    tenant = {"name": "acme", "keys": [{"name": "first", "sha256": hash_of(key)}], "limits": limits}
    file.write_text(json.dumps({"tenants": [tenant]}))
    return file, [("authorization", f"Bearer {key}")]


async def answer_of(call: Any) -> str:
    return text_of([event async for event in call])


async def refusal_of(call: Any) -> tuple[OverloadedError, list[Any]]:
    """The error that the client library raises, and the details on the wire."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer_of(call)
    trailing = dict(caught.value.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    error = error_of(caught.value, "here:1", "")
    assert isinstance(error, OverloadedError)
    return error, [detail.type_url.rpartition(".")[2] for detail in status.details]


async def test_a_tenant_over_its_budget_is_told_which_and_when_to_come_back(tmp_path: Path) -> None:
    file, metadata = keys_file(tmp_path, tokens_per_minute=1000)
    async with running(tmp_path, keys_file=file) as client:
        question = chat_request("x" * 3600, generation_config={"max_output_tokens": 9})
        assert await answer_of(client.chat.Chat(question, metadata=metadata)) == "A cat."
        again = chat_request("x" * 3600, generation_config={"max_output_tokens": 9})
        client.llm.gate = asyncio.Event()  # the second is never settled
        second = asyncio.create_task(answer_of(client.chat.Chat(again, metadata=metadata)))
        while len(client.llm.requests) < 2:
            await asyncio.sleep(0.01)
        error, details = await refusal_of(client.chat.Chat(again, metadata=metadata))
        client.llm.gate.set()
        await second
    assert (error.reason, error.quota) == ("RATE_LIMITED", "tokens_per_minute")
    assert error.retry_after_s is not None
    assert 20.0 < error.retry_after_s <= 50.0  # of 909 tokens some 86 are there; a slow machine has waited already
    assert details == ["ErrorInfo", "RetryInfo", "QuotaFailure"]


async def test_where_there_is_no_room_the_client_is_told_when_there_may_be(tmp_path: Path) -> None:
    async with running(tmp_path, max_running_turns=1, max_waiting_turns=0) as client:
        client.llm.gate = asyncio.Event()
        first = asyncio.create_task(answer_of(client.chat.Chat(chat_request("One?"))))
        while not client.llm.requests:
            await asyncio.sleep(0.01)
        error, details = await refusal_of(client.chat.Chat(chat_request("Two?")))
        client.llm.gate.set()
        assert await first == "A cat."
        assert await answer_of(client.chat.Chat(chat_request("Three?"))) == "A cat."
    assert (error.reason, error.quota, details) == ("QUEUE_FULL", None, ["ErrorInfo", "RetryInfo"])
    assert error.retry_after_s is not None
    assert error.retry_after_s > 0


async def test_a_turn_whose_deadline_passes_while_it_waits_is_never_asked(tmp_path: Path) -> None:
    async with running(tmp_path, max_running_turns=1) as client:
        client.llm.gate = asyncio.Event()
        first = asyncio.create_task(answer_of(client.chat.Chat(chat_request("One?"))))
        while not client.llm.requests:
            await asyncio.sleep(0.01)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answer_of(client.chat.Chat(chat_request("Two?"), timeout=0.2))
        assert caught.value.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)
        client.llm.gate.set()
        assert await first == "A cat."
    assert len(client.llm.requests) == 1
