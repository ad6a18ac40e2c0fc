"""Puts the HTTP API together: the routes, and everything that surrounds them."""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Final, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from gateway.chat import Chat
from gateway.http.bodies import BodyLimits, JsonRoute
from gateway.http.calls import Calls, note
from gateway.http.media_urls import NoFetcher, RemoteFetcher
from gateway.http.operations import Operations
from gateway.http.problems import NOTHING_HERE, Problem, Refusal, problem_of, problem_of_value, refused
from gateway.http.reference import Reference
from gateway.http.routes import Routes
from gateway.http.server import HttpOptions, answering
from gateway.media import MediaLibrary
from gateway.settings import GatewaySettings
from gateway.tokenizing import ModelDirectory, Tokenizing
from shared.errors import InternalError, ServiceError
from shared.metrics import Exposition
from shared.rpc.call_metrics import CallMetrics
from shared.rpc.interceptors import CallRegistry, Gate
from shared.rpc.server import Edge

_NAMES: Final = {
    "/v1/chat/completions": "Http/ChatCompletions",
    "/v1/models": "Http/Models",
    "/tokenize": "Http/Tokenize",
    "/metrics": "Http/Metrics",
    "/docs": "Http/Docs",
    "/openapi.json": "Http/Docs",
}
_PREFIXES: Final = {"/v1/models/": "Http/Models", "/v1/media/": "Http/Media"}
OPEN_PATHS: Final = ("/health", "/health/live", "/health/ready")


@dataclass(frozen=True, slots=True)
class Parts:
    """What HTTP is an edge of. `pages` are routes of pages for people, which anybody may open, at `page_paths`.

    `needs_key`: whether calls have to show an API key, which is for the API's description; `gate` is who asks for it.
    """

    chat: Chat
    library: MediaLibrary
    models: ModelDirectory
    tokenizing: Tokenizing
    gate: Gate | None = None
    remote: RemoteFetcher = field(default_factory=NoFetcher)
    expose: Callable[[], Exposition | None] = lambda: None
    needs_key: bool = False
    pages: Sequence[BaseRoute] = ()
    page_paths: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much a request may bring, all of them may, and how long a client may take no part of an answer."""

    body_bytes: int = 64 << 20
    total_body_bytes: int = 512 << 20
    remote_media: int = 64
    stall_s: float = 60.0


def http_edge(settings: GatewaySettings, parts: Parts) -> Edge:
    """Return the edge that answers HTTP where the settings say."""
    bounds = Bounds(
        settings.http_max_body_bytes,
        settings.http_max_total_body_bytes,
        settings.max_media_per_request,
        settings.client_stall_s,
    )
    options = HttpOptions(
        settings.http_listen,
        settings.http_address_file,
        settings.http_max_connections,
        settings.server_tls,
        settings.http_port_fallback,
    )

    def edge(calls: CallRegistry, metrics: CallMetrics) -> AbstractAsyncContextManager[str]:
        return answering(make_app(parts, calls, metrics, bounds), options)

    return edge


def make_app(parts: Parts, calls: CallRegistry, metrics: CallMetrics, bounds: Bounds | None = None) -> ASGIApp:
    """Return the whole application; its calls are counted and drained by `calls`."""
    bounds = bounds or Bounds()
    routes = Routes(
        parts.chat,
        parts.library,
        parts.models,
        parts.tokenizing,
        parts.remote,
        max_remote_media=bounds.remote_media,
        stall_s=bounds.stall_s,
    )
    api = FastAPI(
        title="InternVL",
        version="1",
        summary="OpenAI's chat completions, answered by InternVL.",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,  # where to would be read off the Host header, which anybody can write
        exception_handlers=_HANDLERS,
    )
    api.router.route_class = JsonRoute
    routes.add_to(api)
    Operations(calls, parts.expose).add_to(api)
    api.router.routes.extend(parts.pages)
    Reference(api, needs_key=parts.needs_key).add()
    limited = BodyLimits(api, bounds.body_bytes, bounds.total_body_bytes)
    return Calls(
        limited,
        calls,
        metrics,
        gate=parts.gate,
        open_paths=(*OPEN_PATHS, *parts.page_paths),
        name_of=name_of,
    )


def name_of(path: str) -> str:
    """Return what requests for a path are called in metrics and logs: one of few names, whatever clients make up."""
    for prefix, name in _PREFIXES.items():
        if path.startswith(prefix):
            return name
    return _NAMES.get(path, "Http/Other")


def _respond(request: Request, problem: Problem) -> Response:
    note(request.scope, problem)
    return Response(problem.content, problem.status, dict(problem.headers), "application/json")


async def _on_service_error(request: Request, error: Exception) -> Response:
    return _respond(request, problem_of(cast(ServiceError, error)))


async def _on_refusal(request: Request, error: Exception) -> Response:
    return _respond(request, cast(Refusal, error).problem)


async def _on_invalid_value(request: Request, error: Exception) -> Response:
    invalid = cast(RequestValidationError, error)
    return _respond(request, problem_of_value(invalid.errors(), invalid.body))


async def _on_http_error(request: Request, error: Exception) -> Response:
    known = cast(HTTPException, error)
    if known.status_code == 404:
        return _respond(request, NOTHING_HERE)
    if known.status_code == 405:
        message = "This path does not take that method."
        return _respond(request, Problem(405, message, "UNIMPLEMENTED", headers=dict(known.headers or {})))
    return _respond(request, refused("Nothing can be made of this request.", status=known.status_code))


async def _on_fault(request: Request, error: Exception) -> Response:
    # What it is has been, or will be, logged by whoever surrounds the request.
    return _respond(request, problem_of(InternalError("The server failed; its log has the request id.")))


_HANDLERS: Final[dict[Any, Callable[[Request, Exception], Any]]] = {
    ServiceError: _on_service_error,
    Refusal: _on_refusal,
    RequestValidationError: _on_invalid_value,
    HTTPException: _on_http_error,
    Exception: _on_fault,
}
