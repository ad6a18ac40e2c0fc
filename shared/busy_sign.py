"""Two services that compute on the same processors tell each other when: times in a file that both have mapped.

Two that compute on all processors at once take turns within every operation, and both wait for threads that do not run.
So each says when it computes, and leaves the processors to the other as its own work allows.
"""

import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Final, Self

from shared.errors import CheckpointError

# The monotonic clock, which all processes of a machine share, when it was last said; 0 for "no more".
_TIME: Final = struct.Struct("d")
# Whoever has ended without a word is not waited for any longer.
_LASTS_S: Final = 60.0
_LOOK_INTERVAL_S: Final = 0.001


class Side(IntEnum):
    """Who says it: its place in the file."""

    VISION = 0
    LANGUAGE = 1

    @property
    def other(self) -> "Side":
        """The neighbour."""
        return Side(1 - self)


class BusySign:
    """Raised by one side while it computes, read by the other, which costs a microsecond.

    Safe to raise from several threads.
    """

    @classmethod
    def at(cls, path: Path | None, side: Side) -> Self | None:
        """Return a side's sign in a file, or None without one; raise `CheckpointError` if there can be no such file."""
        try:
            return cls(path, side) if path else None
        except OSError as error:
            raise CheckpointError(f"--neighbour-file: {path}: {error.strerror}.") from None

    def __init__(self, path: Path, side: Side) -> None:
        """Map the file; make it where there is none. Raises `OSError`."""
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        size = _TIME.size * len(Side)
        try:
            os.ftruncate(file, size)
            self._memory = mmap.mmap(file, size)
        finally:
            os.close(file)
        self._side = side
        self._lock = threading.Lock()
        self._num_raised = 0
        self._count(0)  # a process that was here before may have ended without a word

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Say so while the context lasts."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def neighbour_is_busy(self) -> bool:
        """Return whether the other side computes, by any process's word of the last minute."""
        since: float = _TIME.unpack_from(self._memory, self._side.other * _TIME.size)[0]
        return since > 0 and time.monotonic() - since < _LASTS_S

    def wait_for_neighbour(self, most_s: float) -> None:
        """Wait until the other side does not compute, or for so long."""
        until = time.monotonic() + most_s
        while self.neighbour_is_busy() and time.monotonic() < until:
            time.sleep(_LOOK_INTERVAL_S)

    def _count(self, change: int) -> None:
        with self._lock:
            self._num_raised += change
            now = time.monotonic() if self._num_raised else 0.0
            _TIME.pack_into(self._memory, self._side * _TIME.size, now)
