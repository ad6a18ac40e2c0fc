"""The HTTP edge over a gateway of fakes, behind a real server on a free port."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx2

from gateway.events import ServedModel
from gateway.http import Bounds, HttpOptions, Parts, answering, make_app
from gateway.prompt import Prompt
from gateway.tokenizing import ModelDirectory, Tokenizing
from shared.prometheus import PrometheusRegistry
from shared.rpc.call_metrics import CallMetrics
from shared.rpc.interceptors import CallRegistry
from tests.gateway.fakes_gateway import Gateway

MODEL = "InternVL3-8B"
CHAT, TOKENIZE, MODELS = "/v1/chat/completions", "/tokenize", "/v1/models"


class FakeFacts:
    """A model of one token a character, or a word of the prompt's turns."""

    def __init__(self) -> None:
        self.asked: list[Prompt | str] = []
        self.descriptions = 0

    async def describe_model(self) -> ServedModel:
        self.descriptions += 1
        return ServedModel(MODEL, 4096)

    async def token_ids(self, prompt: Prompt | str) -> tuple[int, ...]:
        self.asked.append(prompt)
        return tuple(range(len(prompt))) if isinstance(prompt, str) else (7, 8, 9)


@dataclass
class Edge:
    """A client of the edge, and what is behind it."""

    client: httpx2.AsyncClient
    address: str
    gateway: Gateway
    calls: CallRegistry
    registry: PrometheusRegistry
    facts: FakeFacts

    async def chat(self, *content: Any, **body: Any) -> httpx2.Response:
        said = content[0] if len(content) == 1 and isinstance(content[0], str) else list(content)
        return await self.client.post(CHAT, json={"messages": [{"role": "user", "content": said}]} | body)

    async def error(self, *content: Any, **body: Any) -> tuple[int, str, str | None]:
        """Return the status, code and param of what a chat is refused with."""
        return error_of(await self.chat(*content, **body))

    async def settled(self) -> None:
        """Return when every call is over; clients know a little earlier."""
        while self.calls.running_count:
            await asyncio.sleep(0)

    @property
    def host(self) -> tuple[str, int]:
        host, _, port = self.address.rpartition(":")
        return host, int(port)


@asynccontextmanager
async def edge_over(
    gateway: Gateway, *, ready: bool = True, bounds: Bounds | None = None, **parts: Any
) -> AsyncIterator[Edge]:
    calls, registry, facts = CallRegistry(), PrometheusRegistry(), FakeFacts()
    calls.ready = ready
    tokenizing = Tokenizing(facts, gateway.encoder, gateway.library, gateway.limits)
    made = replace(
        Parts(gateway.chat, gateway.library, ModelDirectory(facts), tokenizing, expose=registry.exposition), **parts
    )
    app = make_app(made, calls, CallMetrics.declared(registry), bounds)
    async with (
        answering(app, HttpOptions("127.0.0.1:0")) as address,
        httpx2.AsyncClient(base_url=f"http://{address}", timeout=30) as client,
    ):
        yield Edge(client, address, gateway, calls, registry, facts)


def error_of(response: httpx2.Response) -> tuple[int, str, str | None]:
    facts = response.json()["error"]
    assert set(facts) == {"message", "type", "param", "code"}
    return response.status_code, facts["code"], facts["param"]


def events_of(text: str) -> list[Any]:
    """Return the data of every event of a stream; `[DONE]` as it is."""
    found = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    return [each if each == "[DONE]" else json.loads(each) for each in found]


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(content: bytes, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(content)} | more}


def words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
