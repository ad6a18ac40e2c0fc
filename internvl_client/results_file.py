"""A file of results, one line of JSON each: appended whole, read again when a run goes on."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class ResultsInUse(Exception):
    """Another process is writing to the file."""


class ResultsFile:
    """Results by id; of several with one id the last counts. Opened by one process at a time.

    A line that an earlier run has left unfinished is cut off. Raises `ResultsInUse`, and `OSError`.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._succeeded: dict[str, bool] = {}
        try:
            self._take()
            self._read(path)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let others write."""
        os.close(self._file)

    def succeeded(self, identity: str | int) -> bool | None:
        """Return whether the last result of an id is an answer; None where there is no result."""
        return self._succeeded.get(str(identity))

    def append(self, identity: str | int, result: dict[str, Any]) -> None:
        """Add a result, which is an error where it says so under `error`."""
        line = json.dumps({"id": identity} | result, ensure_ascii=False).encode() + b"\n"
        while line:  # a full disk takes a part; what it has then is cut off by the next run
            line = line[os.write(self._file, line) :]
        self._succeeded[str(identity)] = "error" not in result

    def sync(self) -> None:
        """Have what was appended outlive the machine."""
        os.fsync(self._file)

    def _take(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResultsInUse from None

    def _read(self, path: Path) -> None:
        whole = 0
        with path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                with suppress(ValueError, KeyError, TypeError):  # a line of somebody else's
                    result = json.loads(line)
                    self._succeeded[str(result["id"])] = "error" not in result
        os.ftruncate(self._file, whole)
