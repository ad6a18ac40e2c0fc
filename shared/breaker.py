"""Stops calling what keeps failing."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import NoReturn

import structlog

log = structlog.get_logger()


class CircuitBreaker:
    """Stops calling what keeps failing: open after `threshold` failures in a row, then one probe per `pause_s`.

    `changed` is told whether it is open whenever that has changed.
    """

    def __init__(
        self,
        threshold: int = 3,
        pause_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        changed: Callable[[bool], None] = lambda is_open: None,
    ) -> None:
        self._threshold = threshold
        self._pause_s = pause_s
        self._clock = clock
        self._changed = changed
        self._failures = 0
        self._next_probe = 0.0

    @property
    def is_open(self) -> bool:
        """Whether calls are being refused."""
        return self._failures >= self._threshold

    def allow(self) -> bool:
        """Return whether a call may be made now; while open, the call that gets True is the probe."""
        if not self.is_open:
            return True
        now = self._clock()
        if now < self._next_probe:
            return False
        self._next_probe = now + self._pause_s
        return True

    def record(self, *, success: bool) -> None:
        """Note how a call ended."""
        was_open = self.is_open
        if success:
            self._failures = 0
        else:
            self._failures += 1
            self._next_probe = self._clock() + self._pause_s
        if self.is_open != was_open:
            self._changed(self.is_open)


class ProbedBreaker(CircuitBreaker):
    """A breaker that no call probes: open, it stays so until `run` has had an answer.

    `ping` raises one of `failures` while nobody answers.
    """

    def __init__(
        self,
        ping: Callable[[], Awaitable[object]],
        failures: tuple[type[Exception], ...],
        threshold: int = 3,
        every_s: float = 1.0,
        changed: Callable[[bool], None] = lambda is_open: None,
    ) -> None:
        super().__init__(threshold, pause_s=math.inf, changed=changed)
        self._ping = ping
        self._failing = failures
        self._every_s = every_s

    async def run(self) -> NoReturn:
        """Probe while open, until cancelled."""
        while True:
            await asyncio.sleep(self._every_s)
            if self.is_open:
                await self._probe()

    async def _probe(self) -> None:
        try:
            await self._ping()
        except self._failing as error:
            log.debug("store_still_away", error=type(error).__name__)
        else:
            self.record(success=True)
            log.info("store_is_back")
