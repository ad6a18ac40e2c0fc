"""Progress of long loads, as log events once a second."""

import time

import structlog

log = structlog.get_logger()


class ProgressLog:
    """Counts tensors and their bytes as they are read; logs the event at most once a second, and when all is read."""

    def __init__(self, event: str, total_tensors: int, total_bytes: int) -> None:
        self._event = event
        self._total_tensors, self._total_bytes = total_tensors, total_bytes
        self._tensors = self._bytes = 0
        self._began = self._last = time.monotonic()

    def add(self, size_bytes: int) -> None:
        """Note bytes that have been read."""
        self._bytes += size_bytes
        if time.monotonic() - self._last >= 1:
            self._log()

    def add_tensors(self, count: int) -> None:
        """Note tensors that are complete."""
        self._tensors += count
        if self._tensors == self._total_tensors:
            self._log()

    def _log(self) -> None:
        self._last = time.monotonic()
        left = (self._last - self._began) * (self._total_bytes - self._bytes) / max(self._bytes, 1)
        log.info(
            self._event,
            done_tensors=self._tensors,
            total_tensors=self._total_tensors,
            done_mib=self._bytes >> 20,
            total_mib=self._total_bytes >> 20,
            seconds_left=round(left, 1),
        )
