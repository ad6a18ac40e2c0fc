"""Surrounds every call of a server: readiness, request id, deadline, one log line, one translation of errors."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc
import structlog

from shared.errors import DeadlineExceeded, InternalError, NotReady, ServiceError
from shared.rpc.deadline import REQUEST_ID_KEY, adopt
from shared.rpc.status import to_status

log = structlog.get_logger()
_OPEN_SERVICES = ("/grpc.health.", "/grpc.reflection.")  # answer whatever the state of the server
_CUT_S = 2.0  # what a call that has been cut gets to say so to its client
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


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of all four shapes in one `_call` context."""

    def __init__(self, calls: CallRegistry) -> None:
        self._calls = calls

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
        _adopt_call(context)
        task = asyncio.current_task()
        assert task is not None
        outcome = "OK"
        try:
            self._calls.enter(task)
            yield
        except asyncio.CancelledError:
            outcome = "CANCELLED"
            if not self._calls.cut:
                raise
            await _abort(context, NotReady("The service is shutting down; try again.", retry_after_s=1.0))
        except grpc.aio.AbortError:
            raise
        except TimeoutError:
            outcome = "DEADLINE_EXCEEDED"
            await _abort(context, DeadlineExceeded("The deadline has passed."))
        except ServiceError as error:
            outcome = error.reason
            await _abort(context, error)
        except GeneratorExit:
            outcome = "CANCELLED"
            raise
        except Exception:  # the one place where an unknown error becomes a status
            outcome = "INTERNAL"
            log.exception("call_failed", method=method)
            await _abort(context, InternalError("The server failed; its log has the request id."))
        finally:
            self._calls.leave(task)
            duration_ms = round((time.monotonic() - started) * 1e3, 1)
            log.info("call_finished", method=method, outcome=outcome, duration_ms=duration_ms)


def _adopt_call(context: Context) -> None:
    metadata = dict(context.invocation_metadata() or ())
    remaining = context.time_remaining()
    identity = metadata.get(REQUEST_ID_KEY, "")
    adopt(remaining if remaining is None or remaining < 1e9 else None, str(identity))


async def _abort(context: Context, error: ServiceError) -> None:
    status = to_status(error)
    await context.abort(status.code, status.message, status.trailing_metadata)
