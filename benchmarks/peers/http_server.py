"""A peer that is one HTTP server: a child process with a log, on a free port, which is asked whether it answers."""

import shutil
import tempfile
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final

from benchmarks.peers.peer import PeerError, Report
from deploy.local.ports import free_port
from deploy.local.process import ChildProcess
from internvl_client.bench import Target

_POLL_S: Final = 0.2
_REPORT_S: Final = 15.0
_GRACE_S: Final = 20.0
_LOG_LINES: Final = 15
_SHOWN_CHARACTERS: Final = 110


class HttpServer:
    """A running server, which has a session of its own. Blocks; the process dies with the thread that made it."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], port: int) -> None:
        """Start it; `command` has to make it listen on `port` of 127.0.0.1."""
        self._directory = Path(tempfile.mkdtemp(prefix=f"internvl-{name}-"))
        self._process = ChildProcess(name, command, environment, self._directory / f"{name}.log")
        self._failed = False
        self.url = f"http://127.0.0.1:{port}"

    @property
    def pid(self) -> int:
        """The process that was started; others descend from it."""
        return self._process.pid

    def wait_until_ready(self, path: str, timeout_s: float, report: Report) -> None:
        """Return when a GET of `path` succeeds; raise `PeerError`, with the end of the log, where that never is."""
        started = reported = time.monotonic()
        while not answers(self.url + path):
            now = time.monotonic()
            if (code := self._process.exit_code) is not None:
                raise self._failure(f"stopped while starting (exit code {code})")
            if now - started > timeout_s:
                raise self._failure(f"did not answer within {timeout_s:.0f} s")
            if now - reported > _REPORT_S:
                reported = now
                report(f"{now - started:4.0f} s  {self._last_line()}")
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """End it and what it started. Its log stays where it failed."""
        self._process.stop(_GRACE_S)
        if not self._failed:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _last_line(self) -> str:
        lines = self._process.last_lines(1)
        return lines[0][:_SHOWN_CHARACTERS] if lines else "no word yet"

    def _failure(self, what: str) -> PeerError:
        self._failed = True
        tail = "\n".join(f"  {line[:200]}" for line in self._process.last_lines(_LOG_LINES))
        return PeerError(f"{self._process.name} {what}. The end of {self._process.log_file}:\n{tail}")


class HttpPeer(ABC):
    """The part of a `Peer` that is the same for every peer of one server."""

    name: str
    health_path = "/health"
    start_timeout_s: float

    def __init__(self) -> None:
        self._server: HttpServer | None = None
        self._checkpoint = Path()

    @property
    def pids(self) -> tuple[int, ...]:
        """See `Peer`."""
        return (self._server.pid,) if self._server else ()

    def start(self, checkpoint: Path, report: Report) -> str:
        """See `Peer`."""
        self._checkpoint = checkpoint.resolve()
        port = free_port()
        self._server = HttpServer(self.name, self.command(self._checkpoint, port), self.variables(), port)
        try:
            self._server.wait_until_ready(self.health_path, self.start_timeout_s, report)
        except BaseException:
            self.stop()
            raise
        return self._server.url

    def restart(self, report: Report) -> str:
        """Restart all of it: whatever holds the language model holds the vision tower, too."""
        self.stop()
        return self.start(self._checkpoint, report)

    def stop(self) -> None:
        """See `Peer`."""
        if self._server:
            self._server.stop()
            self._server = None

    @abstractmethod
    def command(self, checkpoint: Path, port: int) -> list[str]:
        """Return what starts the server for a checkpoint; raise `PeerError` when it is not installed."""

    @abstractmethod
    def variables(self) -> dict[str, str]:
        """Return the environment variables that it needs."""

    @abstractmethod
    def connect(self, address: str) -> AbstractAsyncContextManager[Target]:
        """See `Peer`."""


def answers(url: str) -> bool:
    """Return whether a GET succeeds now."""
    try:
        with urllib.request.urlopen(url, timeout=2.0) as response:  # noqa: S310  our own loopback URL
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False
