"""Runs a service: binds, answers health checks, warms up, serves, drains on SIGTERM, leaves."""

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection

from shared.errors import CheckpointError
from shared.logging import configure_logging
from shared.rpc.channel import KEEPALIVE_MS
from shared.rpc.interceptors import CallInterceptor, CallRegistry
from shared.settings import ServiceSettings

log = structlog.get_logger()
S = TypeVar("S", bound=ServiceSettings)
LIVENESS, READINESS = "liveness", "readiness"


@dataclass(frozen=True, slots=True)
class Application:
    """What a service's lifespan hands to the server.

    `register` adds the servicers; `services` are their full names; `warm_up` loads what is slow to load, while the
    server already answers health checks with NOT_SERVING.
    """

    register: Callable[[grpc.aio.Server], None]
    services: Sequence[str]
    warm_up: Callable[[], Awaitable[None]] = field(default=lambda: asyncio.sleep(0))


Lifespan = Callable[[S, str], AbstractAsyncContextManager[Application]]


def run(settings: S, service: str, lifespan: Lifespan[S]) -> NoReturn:
    """Serve until SIGTERM or SIGINT and exit: 0 after a drain, 1 with one clear line when the service cannot start."""
    configure_logging(settings, service)
    try:
        asyncio.run(serve(settings, lifespan))
        code = 0
    except* CheckpointError as errors:
        code = _refuse(service, str(errors.exceptions[0]))
    except* OSError as errors:
        code = _refuse(service, f"{errors.exceptions[0]}")
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads that load or run a model do not end on request; everything worth closing has been closed by now.
    os._exit(code)


async def serve(settings: S, lifespan: Lifespan[S]) -> None:
    """Serve until SIGTERM or SIGINT, then drain."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    calls = CallRegistry()
    server = grpc.aio.server(interceptors=[CallInterceptor(calls)], options=server_options(settings.max_message_bytes))
    bound = _bind(server, settings.listen)
    async with lifespan(settings, settings.advertise or bound) as application:
        checks = await _add_health(server, application)
        application.register(server)
        await server.start()
        _announce(settings, bound)
        async with asyncio.TaskGroup() as group:
            warm_up = group.create_task(_become_ready(application, checks, calls))
            await _first_of(stop, warm_up)
            warm_up.cancel()
        if not stop.is_set():
            await stop.wait()
        log.info("draining", calls=calls.running_count)
        await checks.enter_graceful_shutdown()
        await calls.drain(settings.drain_grace_s)
        await server.stop(grace=1.0)
    log.info("stopped")


def server_options(max_message_bytes: int) -> list[tuple[str, str | int]]:
    """Return the options of every server.

    `so_reuseport` off: two servers must never share a port silently. The pending limits: grpcio cancels calls at random
    when more than about a thousand wait to be accepted.
    """
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.server.max_pending_requests", 10_000),
        ("grpc.server.max_pending_requests_hard_limit", 20_000),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.ping_timeout_ms", 5_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def _bind(server: grpc.aio.Server, listen: str) -> str:
    host, _, _ = listen.rpartition(":")
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError:
        raise OSError(f"cannot listen on {listen}: is the port taken? Choose another with --listen.") from None
    return f"{host}:{port}"


def _announce(settings: ServiceSettings, bound: str) -> None:
    log.info("listening", address=bound)
    if settings.address_file:
        # Written beside and moved, so that a reader never sees half an address.
        partial = settings.address_file.with_suffix(".partial")
        partial.write_text(bound)
        partial.replace(settings.address_file)


async def _become_ready(application: Application, checks: health.HealthServicer, calls: CallRegistry) -> None:
    await application.warm_up()
    # What warm-up allocated lives as long as the process: keep the collector from walking it again and again.
    gc.collect()
    gc.freeze()
    calls.ready = True
    for name in ("", READINESS, *application.services):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    log.info("serving")


async def _add_health(server: grpc.aio.Server, application: Application) -> health.HealthServicer:
    checks = health.HealthServicer()
    for name in ("", READINESS, *application.services):
        await checks.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
    await checks.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    names = (*application.services, HEALTH_SERVICE, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return checks


async def _first_of(stop: asyncio.Event, warm_up: asyncio.Task[None]) -> None:
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({stopping, warm_up}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()


def _refuse(service: str, reason: str) -> int:
    print(f"{service}: {reason}", file=sys.stderr)  # noqa: T201  the one line an operator needs to see
    return 1
