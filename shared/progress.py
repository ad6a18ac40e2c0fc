"""Progress of long loads, as log events once a second."""

import time

import structlog

log = structlog.get_logger()


class ProgressLog:
    """Call with bytes done and in all; logs the event at most once a second, with an estimate of what is left."""

    def __init__(self, event: str) -> None:
        self._event = event
        self._began = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Note progress."""
        now = time.monotonic()
        if now - self._last < 1 and done < total:
            return
        self._last = now
        left = (now - self._began) * (total - done) / max(done, 1)
        log.info(self._event, done_mib=done >> 20, total_mib=total >> 20, seconds_left=round(left, 1))
