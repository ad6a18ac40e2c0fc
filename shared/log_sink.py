"""Where log lines go: a bounded queue and a thread that writes them, so that a log nobody reads stops no service."""

import os
import threading
from queue import SimpleQueue
from typing import Final

import structlog

log = structlog.get_logger()
_MAX_LINES: Final = 8192


class LogSink:
    """Writes lines to a file descriptor from a thread of its own.

    `write` never waits: where `max_lines` wait already the line is dropped. How many were is logged as soon as the
    thread has caught up. Safe to use from every thread, and from within a destructor.
    """

    def __init__(self, descriptor: int, max_lines: int = _MAX_LINES) -> None:
        self._descriptor = descriptor
        self._max_lines = max_lines
        # Not a `Queue`: its lock would stop a thread for good that logs from a destructor in the midst of logging.
        self._waiting: SimpleQueue[str | threading.Event] = SimpleQueue()
        self._dropped = 0
        # A daemon, because it may never come back from writing.
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def write(self, line: str) -> None:
        """Have `line`, which ends with a newline, written, or drop and count it."""
        if self._waiting.qsize() < self._max_lines:
            self._waiting.put(line)
        else:
            self._dropped += 1

    def drain(self, timeout_s: float) -> bool:
        """Wait until what has been written so far is out, at most so long; return whether it is."""
        reached = threading.Event()
        self._waiting.put(reached)
        return reached.wait(timeout_s)

    # Below: on the thread.

    def _run(self) -> None:
        reported, works = 0, True
        while True:
            item = self._waiting.get()
            if isinstance(item, str):
                works = self._write(item)
            if works and self._waiting.empty() and (dropped := self._dropped - reported):
                reported += dropped
                log.warning("log_lines_dropped", lines=dropped)
                if not isinstance(item, str):
                    self._waiting.put(item)  # behind the event
            elif not isinstance(item, str):
                item.set()

    def _write(self, line: str) -> bool:
        rest = memoryview(line.encode(errors="backslashreplace"))
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            # No reader, or a full disk. The line is lost; the next may not be.
            self._dropped += 1
            return False
        return True
