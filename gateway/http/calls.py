"""Surrounds every request: readiness, request id, who asks, one log line, the end when the client leaves, errors."""

import asyncio
import time
from collections.abc import Callable, Collection
from typing import Any, Final

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.http.problems import Problem, Refusal, problem_of
from shared import tracing
from shared.errors import NotReady
from shared.rpc.call_metrics import CallMetrics
from shared.rpc.deadline import REQUEST_ID_KEY, adopt
from shared.rpc.interceptors import CallRegistry, Gate, told

log = structlog.get_logger()
_JSON: Final = b"application/json"
_EVENT_STREAM: Final = b"text/event-stream"
_SERVER_FAILED: Final = 500
HANG_UP: Final = "hang_up"  # in a scope's state: closes its connection at once
_PROBLEM: Final = "internvl.problem"  # in a scope: what went wrong, where that was told to the client further inside


class Calls:
    """Answers requests as calls of the service: counted, drained and cut as those of gRPC are.

    `open_paths` answer whatever the state of the service, to everybody, and are not counted. All else passes `gate`.
    `name_of` gives each path its name in metrics and logs.
    """

    def __init__(
        self,
        app: ASGIApp,
        calls: CallRegistry,
        metrics: CallMetrics,
        *,
        gate: Gate | None,
        open_paths: Collection[str],
        name_of: Callable[[str], str],
    ) -> None:
        self._app = app
        self._calls = calls
        self._metrics = metrics
        self._gate = gate
        self._open_paths = frozenset(open_paths)
        self._name_of = name_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return  # there are no WebSockets here
        if scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        task = asyncio.current_task()
        assert task is not None
        started, name = time.monotonic(), self._name_of(scope["path"])
        headers = dict(_text_headers(scope))
        request_id = adopt(None, headers.get(REQUEST_ID_KEY, ""))
        traced: dict[str, str] = {key: headers[key] for key in tracing.HEADERS if key in headers}
        span = tracing.serve(name, traced, {"http.request.method": scope["method"], "http.route": name})
        outbox = Outbox(send, request_id)
        inbox = Inbox(receive, task, outbox)
        problem: Problem | None = None
        self._metrics.start(name)
        try:
            problem = await self._answered(scope, inbox, outbox, task)
        finally:
            await inbox.close()
            duration_s = time.monotonic() - started
            code = problem.grpc_code if problem else "CANCELLED" if inbox.is_gone else "OK"
            self._metrics.finish(name, code, duration_s)
            span.note({"http.response.status_code": outbox.status})
            span.end(code if problem and problem.status >= _SERVER_FAILED else "")  # half a stream has status 200
            log.info(
                "call_finished",
                request_id=request_id,
                method=name,
                code=code,
                reason=(problem.code if problem else None) or "",
                status=outbox.status,
                duration_ms=round(duration_s * 1e3, 1),
            )
            self._calls.leave(task)

    async def _answered(
        self, scope: Scope, inbox: "Inbox", outbox: "Outbox", task: "asyncio.Task[Any]"
    ) -> Problem | None:
        """Answer a request; return what went wrong, if anything did."""
        try:
            self._calls.enter(task)
            self._let_in(scope)
            await self._app(scope, inbox.receive, outbox.send)
            return scope.get(_PROBLEM)
        except asyncio.CancelledError:
            if not (inbox.is_gone or self._calls.cut):
                raise
            task.uncancel()
            if inbox.is_gone:
                return None  # nobody is left to be told
            problem = problem_of(NotReady("The service is shutting down; try again.", retry_after_s=1.0))
        except Refusal as refusal:
            problem = refusal.problem
        except Exception as error:  # noqa: BLE001  the one place where an unknown error becomes a response
            problem = problem_of(told(error, self._name_of(scope["path"])))
        await outbox.tell(problem)
        return problem

    def _let_in(self, scope: Scope) -> None:
        if self._gate:
            self._gate(scope["path"], _text_headers(scope))


class Outbox:
    """The way of a response to the client. Puts the request id on it."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.status = 0
        self.has_ended = False
        self._is_event_stream = False

    async def send(self, message: Message) -> None:
        """Send a part of the response."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", ()))
            self._is_event_stream = any(
                name.lower() == b"content-type" and value.startswith(_EVENT_STREAM) for name, value in headers
            )
            message = {**message, "headers": [*headers, (REQUEST_ID_KEY.encode(), self._request_id.encode())]}
        elif message["type"] == "http.response.body":
            self.has_ended = not message.get("more_body", False)
        await self._send(message)

    async def tell(self, problem: Problem) -> None:
        """Say what went wrong: as the response, or as the last event of a stream that has begun."""
        if self.has_ended:
            return
        if not self.status:
            headers = [(name.encode(), value.encode()) for name, value in problem.headers.items()]
            start = {
                "type": "http.response.start",
                "status": problem.status,
                "headers": [*headers, (b"content-type", _JSON)],
            }
            await self.send(start)
            await self.send({"type": "http.response.body", "body": problem.content})
        elif self._is_event_stream:
            await self.send({"type": "http.response.body", "body": event_of(problem.content)})


class Inbox:
    """The way of a request's body to the application. After the body it waits for the client to leave.

    A client that leaves before its response has ended cancels the request's task.
    """

    def __init__(self, receive: Receive, task: "asyncio.Task[Any]", outbox: Outbox) -> None:
        self._receive = receive
        self._task = task
        self._outbox = outbox
        self._watch: asyncio.Task[None] | None = None
        self._gone = asyncio.Event()

    @property
    def is_gone(self) -> bool:
        """Whether the client left early."""
        return self._gone.is_set()

    async def receive(self) -> Message:
        """Return the next part of the body; after the last one wait until the client has left."""
        if self._watch:
            await self._gone.wait()
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._gone.set()
            raise asyncio.CancelledError
        if not message.get("more_body", False):
            self._watch = asyncio.create_task(self._watch_for_end())
        return message

    async def close(self) -> None:
        """Wait for nothing any more."""
        if self._watch:
            self._watch.cancel()
            await asyncio.wait({self._watch})

    async def _watch_for_end(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._outbox.has_ended:
            self._gone.set()
            self._task.cancel()


def note(scope: Scope, problem: Problem) -> None:
    """Note in a request's scope what its client was told to be wrong."""
    scope[_PROBLEM] = problem


def hang_up(scope: Scope) -> None:
    """Close the connection that a request came on, without waiting for what the client has not taken."""
    if close := scope.get("state", {}).get(HANG_UP):
        close()


def event_of(content: bytes) -> bytes:
    """Return JSON as an event of a stream."""
    return b"data: " + content + b"\n\n"


def _text_headers(scope: Scope) -> list[tuple[str, str]]:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
