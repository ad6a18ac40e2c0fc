"""The page as the gateway serves it, before a server whose answers are written by the test."""

import asyncio
import json
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gateway.http.page import page_routes

DIGEST = "ab" * 32


def receipt(columns: int = 1, rows: int = 1, **changes: Any) -> dict[str, Any]:
    """What one picture cost."""
    count = columns * rows + (columns * rows > 1)
    return {
        "media_digest": DIGEST,
        "tile_count": count,
        "columns": columns,
        "rows": rows,
        "token_count": 256 * count,
        "cache_tier": "NONE",
        "coalesced": False,
        "preprocess_s": 0.012,
        "encode_s": 0.2,
        "transfer_tier": "VISION",
        "transfer_s": 0.003,
        "frames": [],
        **changes,
    }


@dataclass
class Reply:
    """An answer in pieces; after `pause_after` of them it waits for `go_on`. `problem` ends it instead of its facts."""

    pieces: tuple[str, ...] = ("A red ", "square.")
    receipts: tuple[Mapping[str, Any], ...] = ()
    pause_after: int | None = None
    problem: Mapping[str, Any] | None = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    finish_reason: str = "stop"
    go_on: threading.Event = field(default_factory=threading.Event)
    client_left: threading.Event = field(default_factory=threading.Event)

    def response(self) -> Response:
        headers = {"x-request-id": "request-7", **self.headers}
        if self.status != 200:
            return JSONResponse({"error": self.problem}, self.status, headers)
        return StreamingResponse(self._events(), 200, headers, "text/event-stream")

    async def _events(self) -> AsyncIterator[str]:
        try:
            yield ": ping\n\n"
            for index, piece in enumerate(self.pieces):
                if index == self.pause_after:
                    while not self.go_on.is_set():
                        await asyncio.sleep(0.01)
                yield _event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
            if self.problem:
                yield _event({"error": self.problem})
                return
            yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": self.finish_reason}], "usage": None})
            yield _event({"choices": [], "usage": self._usage(), "internvl": self._facts()})
            yield "data: [DONE]\n\n"
        finally:
            self.client_left.set()

    def _usage(self) -> dict[str, Any]:
        visual = sum(each["token_count"] for each in self.receipts)
        return {
            "prompt_tokens": visual + 64,
            "completion_tokens": 42,
            "total_tokens": visual + 106,
            "prompt_tokens_details": {"cached_tokens": 32},
        }

    def _facts(self) -> dict[str, Any]:
        return {
            "request_id": "request-7",
            "visual_tokens": sum(each["token_count"] for each in self.receipts),
            "best_choice": 0,
            "receipts": list(self.receipts),
            "timings": {
                "media_s": 0.215,
                "queue_s": 0.002,
                "prefill_s": 0.31,
                "time_to_first_token_s": 0.53,
                "decode_s": 2.05,
                "total_s": 2.6,
            },
        }


def _event(chunk: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


class ScriptedServer:
    """Serves the page and what the test has written; keeps what was asked."""

    def __init__(self) -> None:
        self.replies: deque[Reply] = deque()
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.url = ""
        self.model = "internvl3-test"

    def app(self) -> Starlette:
        routes = [
            *page_routes(),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._complete, methods=["POST"]),
        ]
        return Starlette(routes=routes)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": self.model}]})

    async def _complete(self, request: Request) -> Response:
        self.bodies.append(await request.json())
        self.keys.append(request.headers.get("authorization", ""))
        return self.replies.popleft().response()


@contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    """Serve on a free port of this machine, from a thread."""
    scripted = ScriptedServer()
    config = uvicorn.Config(scripted.app(), port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    socket = config.bind_socket()
    scripted.url = f"http://127.0.0.1:{socket.getsockname()[1]}"
    thread = threading.Thread(target=server.run, args=([socket],))
    thread.start()
    try:
        yield scripted
    finally:
        server.should_exit = True
        thread.join()
        socket.close()
