"""What those who run the gateway ask over HTTP: its health and its metrics."""

import asyncio
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from starlette.responses import JSONResponse
from starlette.types import Scope

from gateway.auth import check_operator
from gateway.caller import current_caller
from gateway.http import answers
from gateway.http.problems import NOTHING_HERE, Problem, Refusal
from shared.metrics import Exposition
from shared.rpc.interceptors import CallRegistry

_FORWARDING: Final = (b"forwarded", b"x-forwarded-for", b"x-real-ip")
_NOT_LOCAL: Final = Problem(
    403, "Without API keys, metrics are told to this machine only; --metrics-listen opens them.", "PERMISSION_DENIED"
)
_NOT_READY: Final[dict[int | str, dict[str, Any]]] = {
    503: {"model": answers.Health, "description": "Starting or shutting down."}
}


class Operations:
    """Health, for everybody, and metrics: for operators' API keys; where there are no keys, for this machine."""

    def __init__(self, calls: CallRegistry, expose: Callable[[], Exposition | None]) -> None:
        self._calls = calls
        self._expose = expose

    def add_to(self, api: FastAPI) -> None:
        """Add the routes."""
        api.get("/health/live", response_model=answers.Health, tags=["operations"], summary="Whether it lives")(
            self.tell_life
        )
        for path in ("/health", "/health/ready"):
            api.get(
                path,
                response_model=answers.Health,
                responses=_NOT_READY,
                tags=["operations"],
                summary="Whether it answers calls",
            )(self.tell_readiness)
        api.get("/metrics", include_in_schema=False)(self.tell_metrics)

    async def tell_life(self) -> Response:
        """Say that the process answers."""
        return JSONResponse({"status": "ok"})

    async def tell_readiness(self) -> Response:
        """Say whether calls are admitted."""
        if self._calls.ready:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "not ready"}, 503)

    async def tell_metrics(self, request: Request) -> Response:
        """Return all metrics, where any are kept."""
        caller = current_caller()
        check_operator(caller)
        if not (caller.tenant or _is_local(request.scope)):
            raise Refusal(_NOT_LOCAL)
        exposition = await asyncio.to_thread(self._expose)
        if exposition is None:
            raise Refusal(NOTHING_HERE)
        return Response(exposition.content, media_type=exposition.content_type)


def _is_local(scope: Scope) -> bool:
    """Whether a request comes from this machine, and from nobody else by way of it."""
    client, names = scope.get("client"), {name for name, _ in scope["headers"]}
    return client is not None and ip_address(client[0]).is_loopback and names.isdisjoint(_FORWARDING)
