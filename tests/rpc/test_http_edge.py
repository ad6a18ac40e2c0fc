"""HTTP as an edge of the gateway's server: the same calls, the same drain, the same deadline of the process."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway.settings import GatewaySettings
from tests.rpc.scripted_stages import Client, running

BODY = {"messages": [{"role": "user", "content": "Hi"}]}
CHAT = "/v1/chat/completions"


@asynccontextmanager
async def answering(tmp_path: Path, **settings: Any) -> AsyncIterator[tuple[Client, httpx2.AsyncClient]]:
    file = tmp_path / "http"
    async with (
        running(tmp_path, http_listen="127.0.0.1:0", http_address_file=file, **settings) as stages,
        httpx2.AsyncClient(base_url=f"http://{file.read_text()}", timeout=30) as http,
    ):
        yield stages, http


async def test_http_is_answered_by_the_stages_that_grpc_is_answered_by(tmp_path: Path) -> None:
    async with answering(tmp_path) as (stages, http):
        answer = await http.post(CHAT, json=BODY, headers={"x-request-id": "one-two"})
        assert answer.json()["choices"][0]["message"]["content"] == "A cat."
        assert stages.llm.calls == [("one-two", None)]
        assert (await http.get("/v1/models")).json()["data"][0]["id"] == "scripted"
        assert (await http.get("/health")).status_code == 200


async def test_a_client_that_leaves_cancels_the_call_to_the_llm_service(tmp_path: Path) -> None:
    async with answering(tmp_path) as (stages, http):
        stages.llm.gate = asyncio.Event()
        async with http.stream("POST", CHAT, json=BODY | {"stream": True}) as response:
            async for line in response.aiter_lines():
                if "cat." in line:
                    break
        await asyncio.wait_for(stages.llm.cancelled.wait(), 30)


async def test_on_sigterm_streams_end_well_and_nobody_else_is_let_in(tmp_path: Path) -> None:
    async with answering(tmp_path) as (stages, http):
        stages.llm.gate = asyncio.Event()
        async with http.stream("POST", CHAT, json=BODY | {"stream": True}) as response:
            lines = response.aiter_lines()
            assert "assistant" in await anext(lines)
            os.kill(os.getpid(), signal.SIGTERM)
            while (await http.get("/health/ready")).status_code == 200:
                await asyncio.sleep(0)
            assert (await http.get("/health/live")).status_code == 200
            refused = await http.post(CHAT, json=BODY)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            stages.llm.gate.set()
            assert "[DONE]" in "".join([line async for line in lines])


async def test_what_outlives_the_grace_is_told_so(tmp_path: Path) -> None:
    async with answering(tmp_path, drain_grace_s=0) as (stages, http):
        stages.llm.gate = asyncio.Event()
        async with http.stream("POST", CHAT, json=BODY | {"stream": True}) as response:
            lines = response.aiter_lines()
            assert "assistant" in await anext(lines)
            os.kill(os.getpid(), signal.SIGTERM)
            rest = "".join([line async for line in lines])
        assert "NOT_READY" in rest
        assert "[DONE]" not in rest


def test_http_that_others_reach_needs_keys_or_a_word() -> None:
    with pytest.raises(ValueError, match="keys-file"):
        GatewaySettings(vision_target="a:1", llm_target="b:1", http_listen="0.0.0.0:8000")
