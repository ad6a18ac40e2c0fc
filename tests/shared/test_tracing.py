"""Traces as OpenTelemetry gets them: what is whose child, how spans end, and what one chat leaves in three services."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from contextvars import copy_context
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.trace import SpanKind, StatusCode

from shared import tracing
from shared.errors import LlmUnavailable, NotReady
from shared.rpc.deadline import outgoing
from shared.tracing import NO_SPAN, traces_sent
from tests.rpc.scripted_stages import DOG, chat_request, error_of, running
from tests.traces import CALLER, TRACE_ID, Spans, id_of, parent_of, trace_id, traced


@pytest.fixture
def spans() -> Iterator[Spans]:
    with traced() as kept:
        yield kept


async def served(headers: dict[str, str], *work: str, error: Exception | None = None) -> str:
    """Serve a call, in a task of its own as gRPC does."""
    span = tracing.serve("call", headers, {})
    for name in work:
        with tracing.span(name, {"internvl.tiles": 3}):
            if error:
                raise error
    span.end()
    return str(structlog.contextvars.get_contextvars().get("trace_id", ""))


async def test_work_becomes_part_of_the_caller_s_trace(spans: Spans) -> None:
    assert await asyncio.create_task(served({"traceparent": CALLER}, "work")) == TRACE_ID
    call, work = spans.named("call"), spans.named("work")
    assert {trace_id(call), trace_id(work)} == {TRACE_ID}
    assert parent_of(call) == 0xB7AD6B7169203331
    assert parent_of(work) == id_of(call)
    assert call.kind is SpanKind.SERVER


@pytest.mark.parametrize("header", ["", "garbage", CALLER.replace("0", "g")])
async def test_headers_that_cannot_be_read_begin_a_trace(spans: Spans, header: str) -> None:
    await asyncio.create_task(served({"traceparent": header}))
    assert parent_of(spans.named("call")) is None


async def test_calls_do_not_see_one_another(spans: Spans) -> None:
    await asyncio.gather(*(asyncio.create_task(served({}, f"work {number}")) for number in range(5)))
    assert len({trace_id(span) for span in spans.all}) == 5
    assert tracing.current() is NO_SPAN


async def test_an_error_is_named_and_its_words_are_not_told(spans: Spans) -> None:
    with pytest.raises(LlmUnavailable):
        await asyncio.create_task(served({}, "work", error=LlmUnavailable("the words of it")))
    work = spans.named("work")
    assert work.status.status_code is StatusCode.ERROR
    assert spans.attributes("work")["error.type"] == "LLM_UNAVAILABLE"
    assert "words" not in work.to_json()


async def test_what_is_over_is_recorded_where_it_was(spans: Spans) -> None:
    async def serve() -> None:
        span = tracing.serve("call", {}, {})
        now = asyncio.get_running_loop().time()
        tracing.record("prefill", now - 2.0, now - 0.5, {})
        span.end()

    await asyncio.create_task(serve())
    prefill, call = spans.named("prefill"), spans.named("call")
    assert prefill.start_time is not None
    assert prefill.end_time is not None
    assert call.end_time is not None
    assert prefill.end_time - prefill.start_time == pytest.approx(1.5e9, rel=0.01)
    assert prefill.end_time < call.end_time


async def test_calls_made_meanwhile_carry_the_trace_on(spans: Spans) -> None:
    async def serve() -> tuple[dict[str, Any], dict[str, Any]]:
        tracing.serve("call", {"traceparent": CALLER, "tracestate": "vendor=1"}, {})
        child = tracing.begin("child", {}, "client")
        return dict(outgoing()["metadata"]), dict(outgoing(span=child)["metadata"])

    of_call, of_child = await asyncio.create_task(serve())
    assert of_call["tracestate"] == of_child["tracestate"] == "vendor=1"
    assert of_call["traceparent"].split("-")[1] == of_child["traceparent"].split("-")[1] == TRACE_ID
    assert of_call["traceparent"] != of_child["traceparent"]


async def test_without_a_tracer_nothing_is_made_and_nothing_is_sent() -> None:
    async def serve() -> None:
        assert tracing.serve("call", {"traceparent": CALLER}, {}) is NO_SPAN
        with tracing.span("work", {}) as span:
            assert span is NO_SPAN
        assert not outgoing()["metadata"]
        assert "trace_id" not in structlog.contextvars.get_contextvars()

    await asyncio.create_task(serve())


async def test_one_chat_is_one_trace_in_all_three_services(spans: Spans, tmp_path: Path) -> None:
    async with running(tmp_path) as client:
        metadata = (("traceparent", CALLER),)
        call = client.chat.Chat(chat_request(DOG, "What is it?"), metadata=metadata)
        events = [event async for event in call]
        assert events[-1].finished
    assert {trace_id(span) for span in spans.all} == {TRACE_ID}
    chat = spans.named("ChatService/Chat")
    asked, answered = (spans.named("LlmService/Generate", kind) for kind in (SpanKind.CLIENT, SpanKind.SERVER))
    assert (parent_of(asked), parent_of(answered)) == (id_of(chat), id_of(asked))
    encodes = [span for span in spans.all if span.name.endswith("VisionService/Encode")]
    made = [span for span in encodes if span.kind is SpanKind.CLIENT]
    assert {parent_of(span) for span in made} == {id_of(chat)}
    assert {parent_of(span) for span in encodes if span not in made} == {id_of(span) for span in made}
    assert len(made) == 2  # the caches, the bytes


async def test_the_span_of_an_answer_says_what_it_took(spans: Spans, tmp_path: Path) -> None:
    async with running(tmp_path) as client:
        await client.ask("a question of words", generation_config={"temperature": 0.5, "max_output_tokens": 7})
    told = spans.attributes("LlmService/Generate", SpanKind.CLIENT)
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.response.model"] == "scripted"
    assert (told["gen_ai.request.temperature"], told["gen_ai.request.max_tokens"]) == (0.5, 7)
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (3, 2)
    assert told["gen_ai.response.finish_reasons"] == ("stop",)
    assert told["gen_ai.response.time_to_first_chunk"] > 0
    assert (told["server.address"], told["rpc.response.status_code"]) == ("127.0.0.1", "OK")


async def test_no_span_holds_what_was_said(spans: Spans, tmp_path: Path) -> None:
    async with running(tmp_path) as client:
        client.llm.deltas = ["canary answer"]
        metadata = (("authorization", "Bearer canary-key"),)
        async for _ in client.chat.Chat(chat_request(DOG, "canary question"), metadata=metadata):
            pass
    assert spans.all
    for span in spans.all:
        assert "canary" not in span.to_json()


async def test_a_stream_that_its_client_leaves_ends_its_spans(spans: Spans, tmp_path: Path) -> None:
    async with running(tmp_path) as client:
        client.llm.gate = asyncio.Event()
        call = client.chat.Chat(chat_request("Hi"))
        assert await call.read()
        call.cancel()
        await asyncio.wait_for(client.llm.cancelled.wait(), 10)
        while len(spans.all) < 3:
            await asyncio.sleep(0.01)
    assert {span.name.rpartition("/")[2] for span in spans.all} == {"Chat", "Generate"}
    assert {dict(span.attributes or {})["rpc.response.status_code"] for span in spans.all} == {"CANCELLED"}
    assert all(span.status.status_code is StatusCode.UNSET for span in spans.all)


async def test_failed_calls_are_errors_and_refused_ones_are_not(spans: Spans, tmp_path: Path) -> None:
    async with running(tmp_path) as client:
        client.llm.late_error = NotReady("Shutting down.")
        assert (await error_of(client.ask("Hi"))).reason == "LLM_UNAVAILABLE"
        assert (await error_of(client.ask(""))).reason == "EMPTY_MESSAGE"
    failed, refused = [span for span in spans.all if span.name.endswith("ChatService/Chat")]
    assert (failed.status.status_code, dict(failed.attributes or {})["error.type"]) == (
        StatusCode.ERROR,
        "LLM_UNAVAILABLE",
    )
    assert refused.status.status_code is StatusCode.UNSET


async def test_a_generator_that_is_closed_early_leaves_the_reader_s_span_alone(spans: Spans) -> None:
    async def generate() -> Any:
        span = tracing.begin("generated", {})
        try:
            yield 1
            yield 2
        finally:
            span.end()

    async def serve() -> None:
        call = tracing.serve("call", {}, {})
        async with aclosing(generate()) as numbers:
            async for _ in numbers:
                assert tracing.current() is call
                break
        assert tracing.current() is call
        call.end()

    await asyncio.create_task(serve())
    assert parent_of(spans.named("generated")) == id_of(spans.named("call"))


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Gets what a service sends by OTLP."""

    def __init__(self) -> None:
        self.resources: list[dict[str, str]] = []
        self.names: list[str] = []

    def Export(self, request: Any, context: Any) -> trace_service_pb2.ExportTraceServiceResponse:
        for group in request.resource_spans:
            self.resources.append({each.key: each.value.string_value for each in group.resource.attributes})
            self.names += [span.name for scope in group.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    server, kept = grpc.server(ThreadPoolExecutor(1)), Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(kept, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield kept, f"http://127.0.0.1:{port}"
    server.stop(None)


def serve_once(name: str, traceparent: str = "") -> None:
    copy_context().run(lambda: tracing.serve(name, {"traceparent": traceparent}, {}).end())


def test_what_a_service_has_traced_is_sent_before_it_ends(collector: tuple[Collector, str]) -> None:
    kept, endpoint = collector
    with traces_sent(endpoint, 1.0, "gateway"):
        serve_once("call")
    assert kept.names == ["call"]
    assert kept.resources[0]["service.name"] == "gateway"


def test_traces_that_are_sampled_away_are_not_sent(collector: tuple[Collector, str]) -> None:
    kept, endpoint = collector
    with traces_sent(endpoint, 0.0, "gateway"):
        serve_once("begun here")
        serve_once("kept by its caller", CALLER)
    assert kept.names == ["kept by its caller"]


def test_a_collector_that_is_away_holds_nobody_up() -> None:
    with traces_sent("http://127.0.0.1:1", 1.0, "gateway"):
        serve_once("call")


def output_of(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_a_service_that_sends_no_traces_does_not_load_what_would() -> None:
    program = "import sys, gateway.app, shared.rpc.server; print('shared.otel' in sys.modules)"
    assert output_of(program).strip() == "False"


def test_where_the_package_is_missing_the_service_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from shared.tracing import traces_sent\n"
        "try:\n"
        "    with traces_sent('http://127.0.0.1:1', 1.0, 'gateway'): pass\n"
        "except OSError as error: print(error)\n"
    )
    assert "install internvl-serving[tracing]" in output_of(program)
