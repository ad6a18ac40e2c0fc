"""Runs a service: binds, answers health checks, warms up, serves, drains on SIGTERM, leaves."""

import asyncio
import gc
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn, TypeVar

import grpc
import structlog
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_reflection.v1alpha import reflection

from shared.errors import CheckpointError
from shared.logging import configure_logging
from shared.loop_lag import declared_lag, watch_loop_lag
from shared.metrics import NO_METRICS, Registry
from shared.rpc.call_metrics import CallMetrics
from shared.rpc.health import HealthChecks, health_port, watch_progress
from shared.rpc.interceptors import CallInterceptor, CallRegistry, Gate, first_of
from shared.rpc.ports import bind, server_options, write_address
from shared.settings import ServiceSettings
from shared.stall import Progress
from shared.tasks import cancelled
from shared.tracing import traces_sent

log = structlog.get_logger()
S = TypeVar("S", bound=ServiceSettings)
_BROKEN_DRAIN_S: Final = 1.0
_CANCEL_S: Final = 1.0  # what a warm-up that has been cancelled gets to clean up
_LOG_DRAIN_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Application:
    """What a service's lifespan hands to the server.

    `register` adds the servicers; `services` are their full names; `warm_up` loads what is slow to load, while the
    server already answers health checks with NOT_SERVING. `broken` is set, on the event loop, when a part has stopped
    that the service cannot work without: it then ends, so that another can take its place. `gate` says who is let in;
    None: everybody. `parts` say how far they have come; one that stands still makes the service first not ready and
    then not alive. `edges` are further ways in.
    """

    register: Callable[[grpc.aio.Server], None]
    services: Sequence[str]
    warm_up: Callable[[], Awaitable[None]] = field(default=lambda: asyncio.sleep(0))
    broken: asyncio.Event = field(default_factory=asyncio.Event)
    gate: Gate | None = None
    parts: Sequence[Callable[[], Progress]] = ()
    edges: Sequence["Edge"] = ()


# From the registry of calls and their metrics: another way in beside gRPC, on the same event loop, open while the
# context lasts. Its calls are counted and drained with the others. Raises `OSError` where it cannot listen.
Edge = Callable[[CallRegistry, CallMetrics], AbstractAsyncContextManager[object]]


class PartStopped(Exception):
    """A part that the service cannot work without has stopped."""


@dataclass(slots=True)
class Course:
    """How far a service has come: whether it was SERVING, was asked to stop, and was asked again."""

    served: bool = False
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    hurry: asyncio.Event = field(default_factory=asyncio.Event)

    def on_signal(self) -> None:
        """Note a signal that ends the service."""
        (self.hurry if self.stop.is_set() else self.stop).set()


# From the settings, the address that others reach the service under, and where it declares its metrics.
Lifespan = Callable[[S, str, Registry], AbstractAsyncContextManager[Application]]


def run(settings: S, service: str, lifespan: Lifespan[S]) -> NoReturn:
    """Serve until SIGTERM or SIGINT and exit: with 0 after a drain, else with 1 and one clear line as the last."""
    sink = configure_logging(settings, service)
    course, runner = Course(), asyncio.Runner()
    code = 0
    try:
        with traces_sent(settings.trace_endpoint, settings.trace_sample_ratio, service):
            runner.run(serve(settings, lifespan, course))
    except Exception as error:  # noqa: BLE001  whatever it is, an operator has to see it
        code = 1
        sink.write(f"{service}: {_last_words(error, course)}\n")
    sys.stdout.flush()
    sink.drain(_LOG_DRAIN_S)
    # Neither the runner is closed nor the interpreter shut down: both would wait for threads that load or run a model,
    # and those do not end on request. Everything worth closing has been closed by now.
    os._exit(code)


async def serve(settings: S, lifespan: Lifespan[S], course: Course | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal cuts the drain.

    Raises `PartStopped` when the application has become broken, `OSError` when the address is taken, and whatever the
    lifespan raises.
    """
    course = course or Course()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, course.on_signal)
    calls, checks = CallRegistry(), HealthChecks()
    await checks.begin()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(health_port(settings, checks))
        registry = await stack.enter_async_context(_metrics(settings))
        metrics = CallMetrics.declared(registry)
        interceptor = CallInterceptor(calls, metrics, settings.client_stall_s)
        server = grpc.aio.server(interceptors=[interceptor], options=server_options(settings.max_message_bytes))
        stack.push_async_callback(server.stop, None)  # also one that has never started
        bound = bind(server, settings.listen, "--listen", settings.server_tls)
        application = await stack.enter_async_context(lifespan(settings, settings.advertise or bound, registry))
        interceptor.gate = application.gate
        await checks.begin(application.services)
        checks.add_to(server)
        _enable_reflection(server, application)
        application.register(server)
        await server.start()
        for edge in application.edges:
            await stack.enter_async_context(edge(calls, metrics))
        _announce(settings, bound)
        watch = asyncio.create_task(watch_progress(checks, application.parts, settings.part_stall_s))
        stack.push_async_callback(cancelled, watch)
        await _until_ended(application, course, _become_ready(application, checks, calls, course))
        log.info("draining", calls=calls.running_count, broken=application.broken.is_set())
        await cancelled(watch)
        await checks.drain(is_broken=application.broken.is_set())
        await _drain(settings, application, course, calls)
        await server.stop(grace=1.0)  # clients that lag behind get to read how their calls ended
        broken = application.broken.is_set()  # closing may well set it
    if broken:
        raise PartStopped
    log.info("stopped")


@asynccontextmanager
async def _metrics(settings: ServiceSettings) -> AsyncIterator[Registry]:
    """Yield where the service's metrics go. While the context lasts they can be asked for, where the settings say so.

    Raises `OSError` when the address is taken.
    """
    if not settings.metrics_listen:
        yield NO_METRICS
        return
    # Only here: they bring an HTTP server with them.
    from shared.metrics_endpoint import MetricsEndpoint
    from shared.prometheus import PrometheusRegistry

    registry = PrometheusRegistry()
    with MetricsEndpoint(settings.metrics_listen, registry) as endpoint:
        watch = asyncio.create_task(watch_loop_lag(declared_lag(registry)))
        try:
            log.info("metrics_listening", address=endpoint.address)
            write_address(settings.metrics_address_file, endpoint.address)
            yield registry
        finally:
            watch.cancel()


def _announce(settings: ServiceSettings, bound: str) -> None:
    log.info("listening", address=bound)
    write_address(settings.address_file, bound)


async def _become_ready(application: Application, checks: HealthChecks, calls: CallRegistry, course: Course) -> None:
    await application.warm_up()
    # What warm-up allocated lives as long as the process: keep the collector from walking it again and again.
    gc.collect()
    gc.freeze()
    calls.ready = course.served = True
    await checks.serve()
    log.info("serving")


def _enable_reflection(server: grpc.aio.Server, application: Application) -> None:
    names = (*application.services, HEALTH_SERVICE, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)


async def _until_ended(application: Application, course: Course, becoming_ready: Coroutine[Any, Any, None]) -> None:
    """Warm up and serve until a signal comes or the application is broken; raise what keeps it from becoming ready."""
    ready, settled = asyncio.create_task(becoming_ready), asyncio.Event()
    ready.add_done_callback(lambda _: settled.set())
    try:
        await first_of(course.stop, application.broken, settled)
        if ready.done():
            await ready
            await first_of(course.stop, application.broken)
    finally:
        ready.cancel()
        await first_of(settled, timeout_s=_CANCEL_S)


async def _drain(settings: ServiceSettings, application: Application, course: Course, calls: CallRegistry) -> None:
    if application.broken.is_set():
        await calls.drain(min(_BROKEN_DRAIN_S, settings.drain_grace_s), course.hurry)
    else:
        await calls.drain(settings.drain_grace_s, course.hurry, application.broken)


def _last_words(error: Exception, course: Course) -> str:
    """Return the line that an operator reads last; where it cannot say everything, the log does."""
    cause = _first_cause(error)
    if isinstance(cause, PartStopped):
        return "a part that it cannot work without has stopped; see the log."
    if isinstance(cause, CheckpointError | OSError) and str(cause) and not course.served:
        return str(cause)
    event, words = ("stop_failed", "failed while it stopped") if course.served else ("start_failed", "could not start")
    log.error(event, exc_info=error)
    return f"{words}: {type(cause).__name__}; see the log above."


def _first_cause(error: Exception) -> Exception:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
