"""Tells one service that another one computes on the same processors: a time in a file that both have mapped."""

import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self

from shared.errors import CheckpointError

# The monotonic clock, which all processes of a machine share, when it was last said; 0 for "no more".
_TIME: Final = struct.Struct("d")
# Whoever has ended without a word is not waited for any longer.
_LASTS_S: Final = 60.0


class BusySign:
    """Raised by one service while it computes, read by another between its steps, which costs a microsecond.

    Safe to raise from several threads.
    """

    @classmethod
    def at(cls, path: Path | None) -> Self | None:
        """Return the sign in a file, or None without one; raise `CheckpointError` where there can be no such file."""
        try:
            return cls(path) if path else None
        except OSError as error:
            raise CheckpointError(f"--neighbour-file: {path}: {error.strerror}.") from None

    def __init__(self, path: Path) -> None:
        """Map the file; make it where there is none. Raises `OSError`."""
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(file, _TIME.size)
            self._memory = mmap.mmap(file, _TIME.size)
        finally:
            os.close(file)
        self._lock = threading.Lock()
        self._num_raised = 0

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Say so while the context lasts."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def is_raised(self) -> bool:
        """Return whether somebody computes, by any process's word of the last minute."""
        since: float = _TIME.unpack_from(self._memory)[0]
        return since > 0 and time.monotonic() - since < _LASTS_S

    def _count(self, change: int) -> None:
        with self._lock:
            self._num_raised += change
            _TIME.pack_into(self._memory, 0, time.monotonic() if self._num_raised else 0.0)
