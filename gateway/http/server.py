"""The HTTP server: uvicorn on the event loop of the service, which keeps its signals, its drain and its log."""

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from gateway.http.calls import HANG_UP
from shared.rpc.ports import write_address
from shared.tls_files import TlsFiles, WatchedTls

log = structlog.get_logger()
_HEADER_S: Final = 10.0  # what a connection gets to say what it wants
_KEEP_ALIVE_S: Final = 75  # longer than what usually stands in between keeps its own connections
_HEADER_BYTES: Final = 64 << 10
_BACKLOG: Final = 1024
_STOP_S: Final = 1  # for responses that have been cut
_RENEW_EVERY_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """Where HTTP is answered: `listen` is a host:port; `tls` None: in plaintext. `address_file` gets what was bound.

    `port_fallback`: on a free port of that host where the port is taken.
    """

    listen: str
    address_file: Path | None = None
    max_connections: int = 4096
    tls: TlsFiles | None = None
    port_fallback: bool = False


@asynccontextmanager
async def answering(app: ASGIApp, options: HttpOptions) -> AsyncIterator[str]:
    """Answer HTTP while the context lasts; yield the host:port. Raises `OSError` where it cannot listen there."""
    listener, address = _bound(options)
    config = uvicorn.Config(
        app,
        http=_Connection,
        ws="none",
        lifespan="off",
        loop="none",
        log_config=None,
        log_level=logging.CRITICAL + 1,  # it knows less of a request than our own log, and quotes what came
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        limit_concurrency=options.max_connections,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_STOP_S,
        h11_max_incomplete_event_size=_HEADER_BYTES,
        reset_contextvars=True,  # a connection's next request is another's, or may be
    )
    config.load()
    watched = WatchedTls(options.tls) if options.tls else None
    config.ssl = _context(watched.files) if watched else None
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    renewing = asyncio.create_task(_renewed(config.ssl, watched)) if watched and config.ssl else None
    try:
        await server.begun_by(serving)
        log.info("http_listening", address=address, tls=options.tls is not None)
        write_address(options.address_file, address)
        yield address
    finally:
        if renewing:
            renewing.cancel()
        server.should_exit = True
        await serving


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: the service has its own."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._begun = asyncio.Event()

    async def begun_by(self, serving: "asyncio.Task[None]") -> None:
        """Wait until the server listens; raise what keeps `serving`, its own task, from it."""
        begun = asyncio.create_task(self._begun.wait())
        await asyncio.wait({begun, serving}, return_when=asyncio.FIRST_COMPLETED)
        begun.cancel()
        if serving.done():
            await serving

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        self._begun.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


class _Connection(H11Protocol):
    """A connection that is closed when it does not come to the point, and that a response can close at once.

    That is also the end of a body which still comes after its request was refused; until then it is read and dropped,
    because a client that sends loses the refusal when the connection is closed on it.
    """

    def __init__(self, config: uvicorn.Config, server_state: Any, app_state: dict[str, Any], _loop: Any = None) -> None:
        super().__init__(config, server_state, {**app_state, HANG_UP: self._hang_up}, _loop)
        self._waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Note whether a request has come, or the next one begins to come."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._stop_waiting()
        elif self.cycle is not None and self.cycle.response_complete and self._waiting is None:
            self._wait_for_request()

    def _wait_for_request(self) -> None:
        self._waiting = self.loop.call_later(_HEADER_S, self._hang_up)

    def _stop_waiting(self) -> None:
        if self._waiting:
            self._waiting.cancel()
            self._waiting = None

    def _hang_up(self) -> None:
        self.transport.abort()


async def _renewed(context: ssl.SSLContext, watched: WatchedTls) -> None:
    """Have connections that come from now on see certificates that have been replaced."""
    seen = watched.content
    while True:
        await asyncio.sleep(_RENEW_EVERY_S)
        content = await asyncio.to_thread(lambda: watched.content)
        if content is not seen:
            seen = content
            _load(context, watched.files)


def _context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    _load(context, files)
    return context


def _load(context: ssl.SSLContext, files: TlsFiles) -> None:
    assert files.cert_file is not None
    context.load_cert_chain(files.cert_file, files.key_file)
    if files.ca_file:
        context.load_verify_locations(files.ca_file)
        context.verify_mode = ssl.CERT_REQUIRED


def _bound(options: HttpOptions) -> tuple[socket.socket, str]:
    host, _, port = options.listen.rpartition(":")
    try:
        listener = _listener(host.strip("[]"), int(port), or_another=options.port_fallback)
    except OSError as error:
        raise OSError(f"cannot listen on {options.listen} ({error.strerror}); choose another --http-listen.") from None
    listener.setblocking(False)
    return listener, f"{host}:{listener.getsockname()[1]}"


def _listener(host: str, port: int, *, or_another: bool) -> socket.socket:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        if not or_another or error.errno != errno.EADDRINUSE:
            raise
        return socket.create_server((host, 0), family=family, backlog=_BACKLOG)
