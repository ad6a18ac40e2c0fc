"""Answers GET /metrics over HTTP, on threads of its own."""

import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import TCPServer
from typing import Any, Final, Self
from wsgiref.simple_server import WSGIRequestHandler
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import structlog
from prometheus_client.exposition import ThreadingWSGIServer, make_wsgi_app

from shared.prometheus import PrometheusRegistry

log = structlog.get_logger()
PATH: Final = "/metrics"
_POLL_S: Final = 0.2  # how long the end may take to be noticed


class MetricsEndpoint:
    """Serves a registry from `listen`, a host:port, from construction to `close`.

    Raises `OSError` where it cannot listen there. Asking takes the interpreter from the service for a few milliseconds.
    """

    def __init__(self, listen: str, registry: PrometheusRegistry) -> None:
        host, _, port = listen.rpartition(":")
        try:
            self._server = _Server(host.strip("[]"), int(port))
        except OSError as error:
            raise OSError(f"cannot listen on {listen} ({error.strerror}); choose another --metrics-listen.") from None
        self._server.set_app(_only_metrics(make_wsgi_app(registry.exposed)))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_S,), name="metrics", daemon=True)
        self._thread.start()
        self.address = f"{host}:{self._server.server_port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; blocks for up to 0.2 s. What is being answered is."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingWSGIServer):
    """Prometheus' server, which writes nothing to stderr and resolves no names."""

    def __init__(self, host: str, port: int) -> None:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, address = found[0][0], str(found[0][4][0])
        super().__init__((address, port), _Handler)

    def server_bind(self) -> None:
        """Bind without asking a name server for this machine's name, which takes seconds where none answers."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note a connection that came to nothing: one that asked for nothing in time, or did not wait."""
        log.debug("metrics_connection_failed", exc_info=True)


class _Handler(WSGIRequestHandler):
    timeout = 5.0  # for a whole line from whoever is connected

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the base class' name
        """Log nothing."""


def _only_metrics(metrics: Callable[..., Any]) -> WSGIApplication:
    """Return an application that answers nothing but `PATH`; Prometheus' own answers every path alike."""

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] == PATH:
            answer: Iterable[bytes] = metrics(environ, start_response)
            return answer
        start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"Metrics are at {PATH}\n".encode()]

    return application
