"""What a service says of its health to those that probe it: under which names, and on which ports."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import NoReturn

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from shared.rpc.ports import bind, server_options, write_address
from shared.settings import ServiceSettings
from shared.stall import CHECK_EVERY_S, Progress, Stall

log = structlog.get_logger()
STARTUP, READINESS, LIVENESS = "startup", "readiness", "liveness"
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class HealthChecks:
    """The answers of grpc.health.v1. Make it, and use it, on one event loop.

    `startup`: warm-up has ended, which nothing undoes. `readiness`, the empty name and the services' names: calls are
    admitted and getting somewhere. `liveness`: the process is worth keeping; also while it loads, and while it drains.
    """

    def __init__(self) -> None:
        self._servicer = health.HealthServicer()
        self._ready_names: tuple[str, ...] = ("", READINESS)
        self._is_started = self._admits = False
        self._is_alive = self._moves = True
        self._shown: dict[str, bool] = {}

    def add_to(self, server: grpc.aio.Server) -> None:
        """Have a server answer."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def begin(self, services: Sequence[str] = ()) -> None:
        """Say that the process is alive and not ready, nor are the services."""
        self._ready_names += tuple(services)
        await self._show()

    async def serve(self) -> None:
        """Note that warm-up has ended and calls are admitted."""
        self._is_started = self._admits = True
        await self._show()

    async def drain(self, *, is_broken: bool) -> None:
        """Note that calls are no longer admitted, and whether that is because a part has stopped."""
        self._admits, self._is_alive = False, self._is_alive and not is_broken
        await self._show()

    async def heed(self, stalled_s: float, stall_s: float) -> None:
        """Note for how long a model has stood still: it is not ready after half of `stall_s`, not alive after all."""
        before = self._moves, self._is_alive
        self._moves, self._is_alive = stalled_s < stall_s / 2, stalled_s < stall_s
        if before != (self._moves, self._is_alive):
            log.critical("model_moves_again" if self._moves else "model_stands_still", seconds=stalled_s)
        await self._show()

    async def _show(self) -> None:
        shown = {STARTUP: self._is_started, LIVENESS: self._is_alive}
        shown |= dict.fromkeys(self._ready_names, self._admits and self._moves)
        for name, is_good in shown.items():
            if self._shown.get(name) != is_good:
                await self._servicer.set(name, _SERVING if is_good else _NOT_SERVING)
        self._shown = shown


@asynccontextmanager
async def health_port(settings: ServiceSettings, checks: HealthChecks) -> AsyncIterator[None]:
    """Answer health checks, and nothing else, on a port of their own while the context lasts; if the settings name one.

    In plaintext whatever the service's own port speaks, because probes know neither TLS nor keys. Raises `OSError` when
    the address is taken.
    """
    if not settings.health_listen:
        yield
        return
    server = grpc.aio.server(options=server_options(settings.max_message_bytes))
    checks.add_to(server)
    address = bind(server, settings.health_listen, "--health-listen")
    await server.start()
    try:
        log.info("health_listening", address=address)
        write_address(settings.health_address_file, address)
        yield
    finally:
        await server.stop(None)


async def watch_progress(checks: HealthChecks, parts: Sequence[Callable[[], Progress]], stall_s: float) -> NoReturn:
    """Tell `checks` for how long the part that has stood still longest has done so, until cancelled."""
    stalls: defaultdict[Callable[[], Progress], Stall] = defaultdict(Stall)
    while True:
        await asyncio.sleep(CHECK_EVERY_S)
        stalled_s = max((stalls[part].check(part()) for part in parts), default=0.0)
        await checks.heed(stalled_s, stall_s)
