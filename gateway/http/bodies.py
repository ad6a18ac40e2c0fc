"""Bodies of requests: how large, how slow and how intricate one may be, and how much of them is held at once."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, Final

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.http.problems import Problem, Refusal, problem_of, refused
from shared.errors import QueueFull

_READ_ON_LOOP_BYTES: Final = 64 << 10  # more would hold up every stream of the process
_MOST_VALUES: Final = 500_000  # in one body; each takes up to a hundred bytes of memory, however few it is written with
_BODY_S: Final = 60.0
_CONTENT_LENGTH: Final = b"content-length"


class BodyLimits:
    """Lets bodies through up to `max_bytes` each and `max_total_bytes` together. One event loop only."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_total_bytes: int, timeout_s: float = _BODY_S) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_total_bytes = max_total_bytes
        self._timeout_s = timeout_s
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; raise `Refusal` while its body is read."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._check_announced(scope)
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        taken, is_whole = 0, False

        async def receive_limited() -> Message:
            nonlocal taken, is_whole
            if is_whole:
                return await receive()  # which now waits for the client to leave
            message = await self._next(receive, deadline)
            is_whole = not message.get("more_body", False)
            size = len(message.get("body", b""))
            taken += size
            self._held_bytes += size
            if taken > self._max_bytes:
                raise Refusal(self._too_large())
            if self._held_bytes > self._max_total_bytes:
                full = QueueFull("The gateway holds too many large requests; try again later.", retry_after_s=1.0)
                raise Refusal(problem_of(full))
            return message

        try:
            await self._app(scope, receive_limited, send)
        finally:
            self._held_bytes -= taken

    def _check_announced(self, scope: Scope) -> None:
        announced = dict(scope["headers"]).get(_CONTENT_LENGTH, b"")
        if announced.isdigit() and int(announced[:20]) > self._max_bytes:
            raise Refusal(self._too_large())

    async def _next(self, receive: Receive, deadline: float) -> Message:
        try:
            async with asyncio.timeout_at(deadline):
                return await receive()
        except TimeoutError:
            raise Refusal(_TOO_SLOW) from None

    def _too_large(self) -> Problem:
        return refused(f"A body has at most {self._max_bytes} bytes.", status=413)


_TOO_SLOW: Final = Problem(
    408, "The body came too slowly.", "DEADLINE_EXCEEDED", "INVALID_REQUEST", headers={"connection": "close"}
)


class JsonRequest(Request):
    """A request whose JSON is read strictly, within bounds, and beside the event loop where that takes long."""

    async def json(self) -> Any:
        """Return what the body says; raise `JSONDecodeError`, which says nothing."""
        body = await self.body()
        if len(body) <= _READ_ON_LOOP_BYTES:
            return _parsed(body)
        return await asyncio.to_thread(_parsed, body)


class JsonRoute(APIRoute):
    """A route that reads its body as `JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """Return the handler of the route's requests."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            response: Response = await handle(JsonRequest(request.scope, request.receive))
            return response

        return handle_json


def _parsed(body: bytes) -> Any:
    if sum(map(body.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise json.JSONDecodeError("too many values", "", 0)
    try:
        return from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError:
        raise json.JSONDecodeError("no JSON", "", 0) from None
