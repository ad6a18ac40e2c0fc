"""Surrounds every call of a server: readiness, request id, deadline, one log line, one translation of errors."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import grpc
import structlog

from shared.errors import DeadlineExceeded, InternalError, NotReady, ServiceError
from shared.metrics import NO_METRICS
from shared.rpc.call_metrics import CallMetrics, rpc_of
from shared.rpc.deadline import REQUEST_ID_KEY, adopt
from shared.rpc.stall_guard import StallGuard
from shared.rpc.status import to_status
from shared.rpc.tracing import end_call, serve_call

log = structlog.get_logger()
_PUBLIC_SERVICE = "/grpc.health."  # answers everybody
_OPEN_SERVICES = (_PUBLIC_SERVICE, "/grpc.reflection.")  # answer whatever the state of the server
DEFAULT_STALL_S: Final = 30.0
_STATUS_S: Final = 1.5  # what a status gets to reach a client; longer it waits behind messages that nobody reads
_REST_S: Final = 2.0  # what a client gets to send the rest of a stream of requests that is answered before its end
_CUT_S = 2.0  # what a call that has been cut gets to say so to its client
_DEADLINE_S: Final = 0.02  # a call that its client ends so shortly before its deadline has met that, by a clock ahead
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
# Called with the method and the metadata of every call but health checks, in the call's own task and before any of its
# messages is read; raises `ServiceError` for a call that is not let in.
Gate: TypeAlias = Callable[[str, Iterable[tuple[str, str | bytes]]], None]


async def first_of(*events: asyncio.Event, timeout_s: float | None = None) -> None:
    """Return when one of the events is set or the time has passed."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


class CallRegistry:
    """Knows whether calls are admitted and which are running. One event loop only."""

    def __init__(self) -> None:
        self.ready = False
        self.cut = False
        self._running: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def running_count(self) -> int:
        """Calls in progress."""
        return len(self._running)

    def enter(self, task: asyncio.Task[Any]) -> None:
        """Count a call in; raise `NotReady` if none is admitted."""
        if not self.ready:
            raise NotReady("The service is starting or shutting down; try again.", retry_after_s=1.0)
        self._running.add(task)
        self._idle.clear()

    def leave(self, task: asyncio.Task[Any]) -> None:
        """Count a call out."""
        self._running.discard(task)
        if not self._running:
            self._idle.set()

    async def drain(self, grace_s: float, *cuts: asyncio.Event) -> None:
        """Admit no more calls and wait for the running ones.

        Those that go on after `grace_s`, or when one of `cuts` is set, end with a status of our own.
        """
        self.ready = False
        await first_of(self._idle, *cuts, timeout_s=grace_s)
        if self._running:
            log.warning("drain_cut", calls=self.running_count)
            self.cut = True
            for task in self._running:
                task.cancel()
            await first_of(self._idle, timeout_s=_CUT_S)


@dataclass(frozen=True, slots=True)
class _Ending:
    """How a call ended: its status code, the reason where it is an error of ours, and that error."""

    code: str
    reason: str = ""
    error: ServiceError | None = None

    @classmethod
    def by(cls, error: ServiceError) -> _Ending:
        """Return the ending that tells the client an error of ours."""
        return cls(error.code.value, error.reason, error)


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of all four shapes in one `_call` context. Without a `gate` everybody is let in.

    A stream whose client reads nothing for `stall_s` ends.
    """

    def __init__(
        self, calls: CallRegistry, metrics: CallMetrics | None = None, stall_s: float = DEFAULT_STALL_S
    ) -> None:
        self.gate: Gate | None = None
        self._stall_s = stall_s
        self._calls = calls
        self._metrics = metrics or CallMetrics.declared(NO_METRICS)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return the method's handler, wrapped unless its service is always open, or one that refuses the call."""
        handler, method = await continuation(handler_call_details), handler_call_details.method
        if handler is None or method.startswith(_PUBLIC_SERVICE):
            return handler
        if self.gate:
            try:
                self.gate(method, handler_call_details.invocation_metadata or ())
            except ServiceError as error:
                return self._refusing(method, error)
        return handler if method.startswith(_OPEN_SERVICES) else self._wrapped(handler, method)

    def _refusing(self, method: str, error: ServiceError) -> grpc.RpcMethodHandler[Any, Any]:
        async def refuse(requests: Any, context: Context) -> None:
            async with self._call(method, context, error):
                pass

        # Of this shape whatever the method's is: it alone answers before a request has been read and understood.
        handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(refuse)
        return handler

    def _wrapped(self, handler: Any, method: str) -> grpc.RpcMethodHandler[Any, Any]:
        shape = ("stream" if handler.request_streaming else "unary") + (
            "_stream" if handler.response_streaming else "_unary"
        )
        behavior = getattr(handler, shape)

        async def answer_once(request: Any, context: Context) -> Any:
            async with self._call(method, context):
                return await behavior(request, context)

        async def answer_upload(requests: Any, context: Context) -> Any:
            async with self._call(method, context), _read_to_the_end(requests):
                return await behavior(requests, context)

        # Writes by itself and is no generator: however a call ends, a stalled write included, it ends in here.
        async def answer_stream(request: Any, context: Context) -> None:
            assert inspect.isasyncgenfunction(behavior), f"{method} must be an async generator"
            async with self._call(method, context):
                with StallGuard(self._stall_s) as guard:
                    async with aclosing(behavior(request, context)) as responses:
                        async for response in responses:
                            await guard.write(context, response)

        answer_unary = answer_upload if handler.request_streaming else answer_once
        make_handler = getattr(grpc, f"{shape}_rpc_method_handler")
        wrapped: grpc.RpcMethodHandler[Any, Any] = make_handler(
            answer_stream if handler.response_streaming else answer_unary,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return wrapped

    @asynccontextmanager
    async def _call(self, method: str, context: Context, refusal: ServiceError | None = None) -> AsyncIterator[None]:
        started = time.monotonic()
        request_id = _adopt_call(context)
        span = serve_call(method, context.invocation_metadata() or ())
        task = asyncio.current_task()
        assert task is not None
        ending = _Ending("OK")
        self._metrics.start(rpc_of(method))
        try:
            if refusal:
                raise refusal
            self._calls.enter(task)
            yield
        except (asyncio.CancelledError, GeneratorExit) as end:
            ending = self._cancelled(end, context)
            if ending.error is None:
                raise
            await _abort(context, ending.error)
        except grpc.aio.AbortError:
            ending = _Ending(_status_of(context))
            raise
        except Exception as error:  # noqa: BLE001  the one place where an unknown error becomes a status
            known = told(error, method)
            ending = _Ending.by(known)
            await _abort(context, known)
        finally:
            self._calls.leave(task)
            duration_s = time.monotonic() - started
            self._metrics.finish(rpc_of(method), ending.code, duration_s)
            end_call(span, ending.code, ending.reason)
            # The id is said outright: what is left of a stream that its client left ends outside the call's context.
            log.info(
                "call_finished",
                request_id=request_id,
                method=method,
                code=ending.code,
                reason=ending.reason,
                duration_ms=round(duration_s * 1e3, 1),
            )

    def _cancelled(self, end: BaseException, context: Context) -> _Ending:
        """Return how a call ended that did not end by itself; gRPC cancels at a deadline as when the client leaves."""
        if self._calls.cut and isinstance(end, asyncio.CancelledError):
            return _Ending.by(NotReady("The service is shutting down; try again.", retry_after_s=1.0))
        remaining_s = context.time_remaining()
        is_late = remaining_s is not None and remaining_s < _DEADLINE_S
        return _Ending("DEADLINE_EXCEEDED" if is_late else "CANCELLED")


@asynccontextmanager
async def _read_to_the_end(requests: AsyncIterator[Any]) -> AsyncIterator[None]:
    """Read what an upload still brings after its answer or its error is known, and only then let the call end.

    A client on `grpc.aio` that is writing while the status arrives may report INTERNAL instead of it (grpcio's issue
    36066), so a picture that is refused, or that another caller's encode has just answered, would look like our fault.
    """
    try:
        yield
    except Exception:
        await _skip_rest(requests)
        raise
    await _skip_rest(requests)


async def _skip_rest(requests: AsyncIterator[Any]) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(_REST_S):
            async for _ in requests:
                pass


def told(error: Exception, method: str) -> ServiceError:
    """Return what the client of a call is told of an error; one that is not ours is logged."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, TimeoutError):
        return DeadlineExceeded("The deadline has passed.")
    log.exception("call_failed", method=method)
    return InternalError("The server failed; its log has the request id.")


def _status_of(context: Context) -> str:
    """Return the code that a handler has ended its call with by itself."""
    code = context.code()
    return code.name if isinstance(code, grpc.StatusCode) else "UNKNOWN"


def _adopt_call(context: Context) -> str:
    metadata = dict(context.invocation_metadata() or ())
    remaining = context.time_remaining()
    identity = metadata.get(REQUEST_ID_KEY, "")
    return adopt(remaining if remaining is None or remaining < 1e9 else None, str(identity))


async def _abort(context: Context, error: ServiceError) -> None:
    status = to_status(error)
    with suppress(TimeoutError):  # gRPC then holds the status until the client reads, or leaves
        async with asyncio.timeout(_STATUS_S):
            await context.abort(status.code, status.message, status.trailing_metadata)
