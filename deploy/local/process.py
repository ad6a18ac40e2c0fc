"""A child process: its session, log file, exit and memory."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_LEASH = Path(__file__).with_name("leash.py")


class ChildProcess:
    """A program started in a session of its own, so that Ctrl-C reaches only us; stdout and stderr go to `log_file`.

    The kernel kills it when the thread that made it ends, so make it from a thread that outlives it.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log_file: Path, said: str = ""
    ) -> None:
        """Start it; `said` is what it reads from its standard input."""
        self.name = name
        self.log_file = log_file
        self.started = time.monotonic()
        self._swept = False
        leash = [sys.executable, "-I", "-S", str(_LEASH), str(os.getpid())]
        with log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [*leash, *command],
                env=os.environ | environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(said.encode())

    @property
    def pid(self) -> int:
        """The process id, which is also the id of its session."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal's number when a signal ended it."""
        return self._process.poll()

    @property
    def memory_bytes(self) -> int:
        """Resident memory; 0 where that cannot be told."""
        try:
            resident_pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        except OSError:
            return 0
        return int(resident_pages) * os.sysconf("SC_PAGE_SIZE")

    def last_lines(self, count: int = 5) -> list[str]:
        """Return the end of the log."""
        return self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]

    def terminate(self) -> None:
        """Ask it to drain and leave."""
        if self.exit_code is None:
            self._process.terminate()

    def wait(self, timeout_s: float) -> int | None:
        """Return the exit code, or None when it still runs after `timeout_s`."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout_s)
        return None

    def stop(self, grace_s: float) -> None:
        """Terminate it, wait, and kill whatever of its session is left after `grace_s`."""
        try:
            self.terminate()
            self.wait(grace_s)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill it and everything in its session; return when it is gone."""
        if not self._swept:  # later its id may be somebody else's
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._swept = True
        self._process.wait()
