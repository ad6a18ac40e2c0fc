"""Traces by OpenTelemetry, sent by OTLP. Imported only where a service was told where to send them."""

import time
from collections.abc import Mapping
from importlib.metadata import version
from threading import Thread
from typing import Final

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span as ApiSpan
from opentelemetry.trace import SpanKind, Status, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from shared.tracing import Attributes, Kind, Span

_KINDS: Final[Mapping[Kind, SpanKind]] = {
    "server": SpanKind.SERVER,
    "client": SpanKind.CLIENT,
    "internal": SpanKind.INTERNAL,
}
_PROPAGATOR: Final = TraceContextTextMapPropagator()
_FLUSH_S: Final = 1.0  # what a process that ends gives a collector


class OtelSpan:
    """One span of OpenTelemetry's."""

    def __init__(self, span: ApiSpan) -> None:
        self._span = span

    @property
    def trace_id(self) -> str:
        """What the trace is called."""
        return format_trace_id(self._span.get_span_context().trace_id)

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers of W3C Trace Context."""
        headers: dict[str, str] = {}
        _PROPAGATOR.inject(headers, self.context)
        return headers

    @property
    def context(self) -> Context:
        """Where children of this span are made."""
        return set_span_in_context(self._span, Context())

    def note(self, attributes: Attributes) -> None:
        """Add attributes."""
        self._span.set_attributes(attributes)

    def event(self, name: str) -> None:
        """Add an event."""
        self._span.add_event(name)

    def end(self, error: str = "", ended_at: float | None = None) -> None:
        """End it; an error has its kind as attribute and no message, which might hold content."""
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end(_wall_ns(ended_at))


class OtelTracer:
    """Makes spans for a provider to process."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("internvl-serving")

    def start(
        self, name: str, kind: Kind, parent: Span | Mapping[str, str], attributes: Attributes, began_at: float | None
    ) -> Span:
        """Begin a span; headers that cannot be read begin a new trace."""
        context = _context_of(parent)
        return OtelSpan(self._tracer.start_span(name, context, _KINDS[kind], attributes, start_time=_wall_ns(began_at)))

    def flush(self) -> None:
        """Send what has ended, as far as the collector takes it within a moment."""
        # On a thread that may be left behind: what time the provider is given here counts for nothing where the
        # collector is away.
        flushing = Thread(target=self._provider.force_flush, name="traces", daemon=True)
        flushing.start()
        flushing.join(_FLUSH_S)


def sending_tracer(endpoint: str, sample_ratio: float, service: str) -> OtelTracer:
    """Return a tracer whose spans are sent to `endpoint`, in batches and by a thread of their own.

    Of traces that begin here `sample_ratio` are kept; of others those that whoever began them keeps.
    """
    resource = Resource.create(
        {
            "service.name": service,
            "service.namespace": "internvl-serving",
            "service.version": version("internvl-serving"),
        }
    )
    provider = TracerProvider(ParentBased(TraceIdRatioBased(sample_ratio)), resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint, insecure=not endpoint.startswith("https://"))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return OtelTracer(provider)


def _context_of(parent: Span | Mapping[str, str]) -> Context:
    if isinstance(parent, OtelSpan):
        return parent.context
    return _PROPAGATOR.extract(parent if isinstance(parent, Mapping) else parent.headers, Context())


def _wall_ns(moment: float | None) -> int | None:
    """Return the wall clock's time at a moment of the monotonic one; None: now."""
    return None if moment is None else time.time_ns() - round((time.monotonic() - moment) * 1e9)
