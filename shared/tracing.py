"""Traces: what was done for one request, in which service and when, wherever that is told.

Nothing here knows OpenTelemetry; `shared.otel` does. A trace is a tree of spans. A service that was told no endpoint
makes none: every function here then returns at once. No attribute ever holds what was said or shown, or a key.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, Literal, Protocol, TypeAlias

import structlog

Value: TypeAlias = str | int | float | bool | Sequence[str]
Attributes: TypeAlias = Mapping[str, Value]
Kind: TypeAlias = Literal["server", "client", "internal"]
HEADERS: Final = ("traceparent", "tracestate")  # W3C Trace Context


class Span(Protocol):
    """A stretch of work on a request, begun and not yet ended. For any thread; raises nothing."""

    @property
    def trace_id(self) -> str:
        """What the trace is called, in 32 hex digits; empty: nothing is traced."""

    @property
    def headers(self) -> Mapping[str, str]:
        """What a call to another service carries so that its spans become children of this one."""

    def note(self, attributes: Attributes) -> None:
        """Add to what is known of the work."""

    def event(self, name: str) -> None:
        """Note that something happened now."""

    def end(self, error: str = "", ended_at: float | None = None) -> None:
        """End it, once: now, or at a moment of the monotonic clock. `error` says of what kind the failure was."""


class Tracer(Protocol):
    """Makes spans. For any thread."""

    def start(
        self, name: str, kind: Kind, parent: Span | Mapping[str, str], attributes: Attributes, began_at: float | None
    ) -> Span:
        """Begin a span under another one, or under what `headers` name; now, or at a moment of the monotonic clock."""


class _NoSpan:
    """The span of what is not traced."""

    trace_id: Final = ""
    headers: Final[Mapping[str, str]] = {}

    def note(self, attributes: Attributes) -> None:
        """Keep nothing."""

    def event(self, name: str) -> None:
        """Keep nothing."""

    def end(self, error: str = "", ended_at: float | None = None) -> None:
        """Do nothing."""


class _NoTracer:
    """The tracer of a service that sends no traces."""

    def start(
        self, name: str, kind: Kind, parent: Span | Mapping[str, str], attributes: Attributes, began_at: float | None
    ) -> Span:
        """Return a span that keeps nothing."""
        return NO_SPAN


NO_SPAN: Final = _NoSpan()
NO_TRACER: Final = _NoTracer()
_tracer: Tracer = NO_TRACER
_current: ContextVar[Span] = ContextVar("span", default=NO_SPAN)


def install(tracer: Tracer) -> None:
    """Have this process's spans made by `tracer` from now on."""
    global _tracer
    _tracer = tracer


def current() -> Span:
    """Return the span of what the running task does; one that keeps nothing where it is not traced."""
    return _current.get()


def serve(name: str, headers: Mapping[str, str], attributes: Attributes) -> Span:
    """Begin the span of a call that has arrived, current for the rest of its task and for tasks that it starts.

    The task's log lines name the trace.
    """
    if _tracer is NO_TRACER:
        return NO_SPAN
    span = _tracer.start(name, "server", headers, attributes, None)
    _current.set(span)
    structlog.contextvars.bind_contextvars(trace_id=span.trace_id)
    return span


def begin(name: str, attributes: Attributes, kind: Kind = "internal") -> Span:
    """Begin a span under the current one without making it that: for generators, which their readers interrupt."""
    parent = _current.get()
    return NO_SPAN if parent is NO_SPAN else _tracer.start(name, kind, parent, attributes, None)


def record(name: str, began_at: float, ended_at: float, attributes: Attributes) -> None:
    """Note a stretch of work under the current span that is over, by moments of the monotonic clock."""
    if (parent := _current.get()) is not NO_SPAN:
        _tracer.start(name, "internal", parent, attributes, began_at).end(ended_at=ended_at)


@contextmanager
def span(name: str, attributes: Attributes, kind: Kind = "internal") -> Iterator[Span]:
    """Do the work of the context under a span of its own. What is raised ends it as an error of that class's name."""
    if (made := begin(name, attributes, kind)) is NO_SPAN:
        yield NO_SPAN
        return
    token = _current.set(made)
    error = ""
    try:
        yield made
    except Exception as raised:
        error = reason_of(raised)
        raise
    finally:
        _current.reset(token)
        made.end(error)


def reason_of(error: BaseException) -> str:
    """Return what an error is called in traces: our own reason, else its class."""
    return str(getattr(error, "reason", "") or type(error).__name__)


@contextmanager
def traces_sent(endpoint: str, sample_ratio: float, service: str) -> Iterator[None]:
    """Send this process's traces to a collector while the context lasts; to none where there is no endpoint.

    Raises `OSError` where OpenTelemetry is not installed.
    """
    if not endpoint:
        yield
        return
    try:
        from shared.otel import sending_tracer
    except ImportError:
        raise OSError("--trace-endpoint needs OpenTelemetry: install internvl-serving[tracing].") from None
    tracer = sending_tracer(endpoint, sample_ratio, service)
    install(tracer)
    try:
        yield
    finally:
        install(NO_TRACER)
        tracer.flush()
