"""Every call is counted in and out once, whatever its shape and however it ends; over a real channel."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

import grpc
import pytest
import structlog

from shared.errors import ApiKeyInvalid, QueueFull
from shared.prometheus import PrometheusRegistry
from shared.rpc.call_metrics import CallMetrics
from shared.rpc.interceptors import CallInterceptor, CallRegistry

SHAPES = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
SERVICE = "test.v1.ShapeService"
LARGE = b"x" * (64 << 10)


class Ending(NamedTuple):
    """What the handler and the client do, and the codes that this may be counted under."""

    handler: str
    client: str
    codes: set[str]


ENDINGS = {
    "success": Ending("answer", "wait", {"OK"}),
    "an error of ours": Ending("refuse", "wait", {"RESOURCE_EXHAUSTED"}),
    "an unknown error": Ending("fail", "wait", {"INTERNAL"}),
    "a timeout within": Ending("time out", "wait", {"DEADLINE_EXCEEDED"}),
    "a status of the handler's own": Ending("abort", "wait", {"ABORTED"}),
    "the client cancels": Ending("hang", "cancel", {"CANCELLED"}),
    # The client's clock runs out a little before the server's: on a slow machine that looks as if it had left.
    "the deadline passes": Ending("hang", "expire", {"DEADLINE_EXCEEDED", "CANCELLED"}),
    "the client's connection is gone": Ending("hang", "disconnect", {"CANCELLED"}),
    "the drain is cut": Ending("hang", "outlast", {"UNAVAILABLE"}),
    "refused while not ready": Ending("answer", "come early", {"UNAVAILABLE"}),
    "refused at the gate": Ending("answer", "be a stranger", {"UNAUTHENTICATED"}),
    "refused at the gate, while not ready": Ending("answer", "be an early stranger", {"UNAUTHENTICATED"}),
}


class Handler:
    """A method in every shape, which does what the ending says."""

    def __init__(self, act: str) -> None:
        self._act = act
        self.entered = asyncio.Event()

    def of_shape(self, shape: str) -> Any:
        make: Callable[[Any], Any] = getattr(grpc, f"{shape}_rpc_method_handler")
        return make(self._once if shape.endswith("unary") else self._stream)

    async def _once(self, request: Any, context: Any) -> bytes:
        await self._do(context)
        return b"done"

    async def _stream(self, request: Any, context: Any) -> AsyncIterator[bytes]:
        yield b"begun"
        while self._act == "flood":
            self.entered.set()
            yield LARGE
        await self._do(context)
        yield b"done"

    async def _do(self, context: Any) -> None:
        self.entered.set()
        match self._act:
            case "refuse":
                raise QueueFull("Later.", retry_after_s=1.0)
            case "fail":
                raise ValueError("/secret")
            case "time out":
                raise TimeoutError
            case "abort":
                await context.abort(grpc.StatusCode.ABORTED, "no")
            case "hang":
                await asyncio.Event().wait()


class Bench:
    """A server with one method per shape, its metrics, and a client."""

    def __init__(self, act: str) -> None:
        self.handler = Handler(act)
        self.calls = CallRegistry()
        self.calls.ready = True
        self.registry = PrometheusRegistry()
        self.interceptor = CallInterceptor(self.calls, CallMetrics.declared(self.registry))
        self.server = grpc.aio.server(interceptors=[self.interceptor])
        methods = {shape: self.handler.of_shape(shape) for shape in SHAPES}
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}")

    def call(self, shape: str, timeout: float | None = None) -> Any:
        async def requests() -> AsyncIterator[bytes]:
            yield b"request"

        request = b"request" if shape.startswith("unary") else requests()
        return getattr(self.channel, shape)(f"/{SERVICE}/{shape}")(
            request, timeout=timeout, metadata=(("x-request-id", "abc-1"),)
        )

    def value(self, name: str, shape: str, **labels: str) -> float | None:
        return self.registry.value(f"internvl_rpc_{name}", rpc=f"ShapeService/{shape}", **labels)

    def finished(self, shape: str) -> dict[str, float]:
        """How many calls have ended, by code."""
        return {
            sample.labels["code"]: sample.value
            for family in self.registry.exposed.collect()
            for sample in family.samples
            if sample.name == "internvl_rpc_finished_total" and sample.labels["rpc"] == f"ShapeService/{shape}"
        }

    async def settled(self, shape: str) -> None:
        """Wait until every call that came has ended on the server's side too."""
        async with asyncio.timeout(20):
            while self.value("started_total", shape) is None or self.value("in_progress", shape):
                await asyncio.sleep(0.01)


@asynccontextmanager
async def bench(act: str) -> AsyncIterator[Bench]:
    made = Bench(act)
    await made.server.start()
    try:
        yield made
    finally:
        await made.channel.close()
        await made.server.stop(None)


async def received(call: Any, shape: str) -> None:
    """Read the call to its end, whatever that is."""
    with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        if shape.endswith("unary"):
            await call
        else:
            async for _ in call:
                pass


def keep_out(method: str, metadata: Any) -> None:
    raise ApiKeyInvalid("No.")


async def play(made: Bench, shape: str, client: str) -> None:
    made.calls.ready = "early" not in client
    if "stranger" in client:
        made.interceptor.gate = keep_out
    call = made.call(shape, timeout=0.3 if client == "expire" else None)
    reading = asyncio.create_task(received(call, shape))
    if client in ("cancel", "disconnect", "outlast"):
        await made.handler.entered.wait()
    if client == "cancel":
        call.cancel()
    elif client == "disconnect":
        await made.channel.close()
    elif client == "outlast":
        await made.calls.drain(0.0)
    await reading


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
async def test_what_was_started_is_finished_once_whatever_happens(shape: str, ending: Ending) -> None:
    async with bench(ending.handler) as made:
        with structlog.testing.capture_logs() as events:
            await play(made, shape, ending.client)
            await made.settled(shape)
        finished = made.finished(shape)
        assert made.value("started_total", shape) == sum(finished.values()) == 1
        assert finished.keys() <= ending.codes
        assert made.value("in_progress", shape) == 0
        assert made.value("duration_seconds_count", shape) == 1
        assert made.calls.running_count == 0
    (line,) = [event for event in events if event["event"] == "call_finished"]
    assert (line["request_id"], line["method"], {line["code"]}) == ("abc-1", f"/{SERVICE}/{shape}", finished.keys())
    assert line["duration_ms"] >= 0


@pytest.mark.parametrize("shape", ["unary_stream", "stream_stream"])
async def test_a_stream_whose_client_leaves_without_reading_is_finished_too(shape: str) -> None:
    async with bench("flood") as made:
        with structlog.testing.capture_logs() as events:
            call = made.call(shape)
            await made.handler.entered.wait()
            call.cancel()
            await made.settled(shape)
        assert made.finished(shape) == {"CANCELLED": 1}
        assert made.calls.running_count == 0
    assert [event["request_id"] for event in events if event["event"] == "call_finished"] == ["abc-1"]


async def test_calls_that_nobody_serves_make_no_series() -> None:
    async with bench("answer") as made:
        with pytest.raises(grpc.aio.AioRpcError):
            await made.channel.unary_unary(f"/{SERVICE}/NoSuchMethod")(b"")
        with pytest.raises(grpc.aio.AioRpcError):
            await made.channel.unary_unary("/no.such.Service/unary_unary")(b"")
        await made.call("unary_unary")
        text = [sample.labels for family in made.registry.exposed.collect() for sample in family.samples]
    assert {labels["rpc"] for labels in text if "rpc" in labels} == {"ShapeService/unary_unary"}


class Context:
    """What a handler gets of gRPC, as far as it is asked here; `remaining_s` is what the deadline has left."""

    def __init__(self, remaining_s: float | None) -> None:
        self._remaining_s = remaining_s

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def time_remaining(self) -> float | None:
        return self._remaining_s


@pytest.mark.parametrize(
    ("remaining_s", "code"),
    [(-0.1, "DEADLINE_EXCEEDED"), (0.0, "DEADLINE_EXCEEDED"), (9, "CANCELLED"), (None, "CANCELLED")],
)
async def test_a_call_that_is_ended_at_its_deadline_has_met_it(remaining_s: float | None, code: str) -> None:
    registry, handler = PrometheusRegistry(), Handler("hang")
    calls = CallRegistry()
    calls.ready = True
    interceptor = CallInterceptor(calls, CallMetrics.declared(registry))

    async def continuation(details: Any) -> Any:
        return handler.of_shape("unary_unary")

    details = type("Details", (), {"method": "/a.B/C"})()
    wrapped = await interceptor.intercept_service(continuation, details)
    call = asyncio.create_task(wrapped.unary_unary(b"", Context(remaining_s)))  # type: ignore[union-attr]
    await handler.entered.wait()
    call.cancel()
    await asyncio.wait([call])
    assert registry.value("internvl_rpc_finished_total", rpc="B/C", code=code) == 1
