"""Spans of gRPC calls, on both sides: what they are called, and how they travel and end."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from shared import tracing
from shared.errors import ServiceError
from shared.tracing import HEADERS, Span, Value

# Codes with which a server says that it has failed; with the others it has answered.
_FAILURES: Final = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
_CODE: Final = "rpc.response.status_code"


def serve_call(method: str, metadata: Iterable[tuple[str, str | bytes]]) -> Span:
    """Begin the span of a call that has arrived, under its caller's."""
    name = method.removeprefix("/")
    headers = {key: value for key, value in metadata if key in HEADERS and isinstance(value, str)}
    return tracing.serve(name, headers, attributes_of(name))


def end_call(span: Span, code: str, reason: str) -> None:
    """End the span of a call that was answered, here or by whoever was called."""
    span.note({_CODE: code})
    span.end((reason or code) if code in _FAILURES else "")


def attributes_of(name: str) -> dict[str, Value]:
    """Return what a span says of a method of this full name."""
    return {"rpc.system.name": "grpc", "rpc.method": name}


@contextmanager
def calling(name: str, address: str) -> Iterator[Span]:
    """Make a call to another service under a span; `headers` of it have to go with the call.

    The span does not become the current one, so that a generator may be interrupted within the context.
    """
    span = tracing.begin(name, attributes_of(name) | _place_of(address), "client")
    code = reason = "CANCELLED"  # closed before its end
    try:
        yield span
        code = reason = "OK"
    except ServiceError as error:
        code, reason = error.code.value, error.reason
        raise
    finally:
        end_call(span, code, reason)


def _place_of(address: str) -> dict[str, Value]:
    host, _, port = address.rpartition(":")
    return {"server.address": host.strip("[]"), "server.port": int(port)} if port.isdecimal() else {}
