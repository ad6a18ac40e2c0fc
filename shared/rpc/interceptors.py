"""Surrounds every call of a server: readiness, request id, deadline, one log line, one translation of errors."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import grpc
import structlog

from shared.errors import DeadlineExceeded, InternalError, NotReady, ServiceError
from shared.metrics import NO_METRICS
from shared.rpc.call_metrics import CallMetrics, rpc_of
from shared.rpc.deadline import REQUEST_ID_KEY, adopt
from shared.rpc.status import to_status

log = structlog.get_logger()
_OPEN_SERVICES = ("/grpc.health.", "/grpc.reflection.")  # answer whatever the state of the server
_CUT_S = 2.0  # what a call that has been cut gets to say so to its client
_DEADLINE_S: Final = 0.02  # a call that its client ends so shortly before its deadline has met that, by a clock ahead
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


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
    """Wraps the handlers of all four shapes in one `_call` context."""

    def __init__(self, calls: CallRegistry, metrics: CallMetrics | None = None) -> None:
        self._calls = calls
        self._metrics = metrics or CallMetrics.declared(NO_METRICS)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return the method's handler, wrapped unless its service is always open."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_OPEN_SERVICES):
            return handler
        return self._wrapped(handler, handler_call_details.method)

    def _wrapped(self, handler: Any, method: str) -> grpc.RpcMethodHandler[Any, Any]:
        shape = ("stream" if handler.request_streaming else "unary") + (
            "_stream" if handler.response_streaming else "_unary"
        )
        behavior = getattr(handler, shape)

        async def answer_once(request: Any, context: Context) -> Any:
            async with self._call(method, context):
                return await behavior(request, context)

        async def answer_stream(request: Any, context: Context) -> AsyncIterator[Any]:
            assert inspect.isasyncgenfunction(behavior), f"{method} must be an async generator"
            async with self._call(method, context):
                responses = behavior(request, context)
                try:
                    async for response in responses:
                        yield response
                finally:
                    await responses.aclose()

        make_handler = getattr(grpc, f"{shape}_rpc_method_handler")
        wrapped: grpc.RpcMethodHandler[Any, Any] = make_handler(
            answer_stream if handler.response_streaming else answer_once,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return wrapped

    @asynccontextmanager
    async def _call(self, method: str, context: Context) -> AsyncIterator[None]:
        started = time.monotonic()
        request_id = _adopt_call(context)
        task = asyncio.current_task()
        assert task is not None
        ending = _Ending("OK")
        self._metrics.start(rpc_of(method))
        try:
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
            told = _told(error, method)
            ending = _Ending.by(told)
            await _abort(context, told)
        finally:
            self._calls.leave(task)
            duration_s = time.monotonic() - started
            self._metrics.finish(rpc_of(method), ending.code, duration_s)
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


def _told(error: Exception, method: str) -> ServiceError:
    """Return what the client is told of an error."""
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
    await context.abort(status.code, status.message, status.trailing_metadata)
