"""What a system under measurement offers, ours and others' alike."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from internvl_client.bench import Target

Report = Callable[[str], object]


class PeerError(Exception):
    """A peer cannot be installed or started; the message says what to do next."""


class Peer(Protocol):
    """A server that can be started, asked and stopped.

    `start`, `restart` and `stop` block; call them from one thread, which has to outlive the server.
    """

    @property
    def name(self) -> str:
        """What its figures are headed with."""

    @property
    def pids(self) -> tuple[int, ...]:
        """Its processes, without their descendants; empty while it does not run."""

    def start(self, checkpoint: Path, report: Report) -> str:
        """Start it and return its address once it answers; `report` is told how far it is. Raises `PeerError`."""

    def restart(self, report: Report) -> str:
        """End whatever holds the language model, start it again, and return the address; raise `PeerError`."""

    def stop(self) -> None:
        """End its processes and their descendants. Does nothing where nothing runs."""

    def connect(self, address: str) -> AbstractAsyncContextManager[Target]:
        """Return what asks it, within a running event loop."""
