"""Carries the caller's deadline and request id from an incoming call to the calls made on its behalf."""

import re
import time
import uuid
from collections.abc import Sequence
from contextvars import Context, ContextVar, copy_context
from typing import TypedDict

import structlog

from shared import tracing
from shared.errors import DeadlineExceeded

REQUEST_ID_KEY = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_MARGIN_S = 0.02  # what a hop keeps for itself, so that the inner call ends before the outer one

_expires_at: ContextVar[float | None] = ContextVar("expires_at", default=None)
_request_id: ContextVar[str] = ContextVar("request_id", default="")


class CallOptions(TypedDict):
    """Keyword arguments of a stub's method."""

    timeout: float | None
    metadata: Sequence[tuple[str, str]]


def adopt(remaining_s: float | None, request_id: str) -> str:
    """Make an incoming call's deadline and request id those of the current task; return the id, drawn anew if unfit."""
    accepted = request_id if _REQUEST_ID.fullmatch(request_id) else uuid.uuid4().hex
    _expires_at.set(None if remaining_s is None else time.monotonic() + remaining_s)
    _request_id.set(accepted)
    structlog.contextvars.bind_contextvars(request_id=accepted)
    return accepted


def detached() -> Context:
    """Return a context for work that several calls share: it keeps the request id, but no caller's deadline ends it."""
    context = copy_context()
    context.run(_expires_at.set, None)
    return context


def request_id() -> str:
    """Return the request id of the current task; empty outside a call."""
    return _request_id.get()


def remaining_s() -> float | None:
    """Return the seconds left for the current call; None without a deadline."""
    expires_at = _expires_at.get()
    return None if expires_at is None else expires_at - time.monotonic()


def outgoing(limit_s: float | None = None, span: tracing.Span | None = None) -> CallOptions:
    """Return timeout and metadata for a call made on behalf of the current one, at most `limit_s` long.

    What is done there becomes part of `span` in the trace, or else of what is done here.
    Raises `DeadlineExceeded` when no time is left for it.
    """
    left = remaining_s()
    if left is not None:
        left -= _MARGIN_S
        if left <= 0:
            raise DeadlineExceeded("The deadline passed before the next stage could begin.")
    candidates = [value for value in (left, limit_s) if value is not None]
    identity = request_id()
    return CallOptions(
        timeout=min(candidates, default=None),
        metadata=(*(((REQUEST_ID_KEY, identity),) if identity else ()), *(span or tracing.current()).headers.items()),
    )
