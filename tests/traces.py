"""What tests of traces share: a caller's header, and the spans that have ended."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from shared import tracing
from shared.otel import OtelTracer

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


class Spans:
    """What has ended."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()

    @property
    def all(self) -> tuple[ReadableSpan, ...]:
        return self.exporter.get_finished_spans()

    def named(self, name: str, kind: SpanKind | None = None) -> ReadableSpan:
        (found,) = [span for span in self.all if span.name.endswith(name) and kind in (None, span.kind)]
        return found

    def attributes(self, name: str, kind: SpanKind | None = None) -> dict[str, Any]:
        return dict(self.named(name, kind).attributes or {})


def trace_id(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.trace_id:032x}"


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent else None


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.span_id)


@contextmanager
def traced() -> Iterator[Spans]:
    """Trace what this process does while the context lasts."""
    kept, provider = Spans(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept.exporter))
    tracing.install(OtelTracer(provider))
    try:
        yield kept
    finally:
        tracing.install(tracing.NO_TRACER)
