"""One replica as this gateway sees it: whether it serves, how much it has to do, how it has failed of late."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

State = Literal["ready", "ejected", "stalled", "away"]


@dataclass(frozen=True, slots=True)
class RoutingPolicy:
    """What is asked of replicas. Times in seconds.

    A replica is passed over where it has more than `load_factor` times the mean of calls in progress, but never with
    fewer than `free_calls`: to keep a prefix is worth more than evenness among so few.

    One that fails is left alone for `ejection_s`, twice as long after each further failure in a row, up to
    `max_ejection_s`. One that has not begun to answer for `stall_s` gets no more until it does.

    A call waits `patience_s` for a replica where none serves.
    """

    load_factor: float = 1.5
    free_calls: int = 4
    ejection_s: float = 1.0
    max_ejection_s: float = 30.0
    faults_in_a_row: int = 3
    stall_s: float = math.inf
    patience_s: float = 1.0


class Replica:
    """What is known of one replica. One event loop only; what it says of itself may be read on any thread."""

    def __init__(self, address: str, policy: RoutingPolicy, clock: Callable[[], float] = time.monotonic) -> None:
        self.address = address
        self.is_serving = False
        self.calls = 0
        self.last_picked = 0
        self._policy = policy
        self._clock = clock
        self._unanswered: dict[object, float] = {}  # calls that have had no answer yet, by when they began
        self._failures = 0
        self._faults = 0
        self._ejected_until = -math.inf

    @property
    def state(self) -> State:
        """What counts most of what is known."""
        if not self.is_serving:
            return "away"
        if self.is_ejected:
            return "ejected"
        return "stalled" if self.is_stalled else "ready"

    @property
    def is_ejected(self) -> bool:
        """Whether it has failed so recently that it is left alone."""
        return self._clock() < self._ejected_until

    @property
    def is_stalled(self) -> bool:
        """Whether a call has waited too long for it to begin."""
        oldest = next(iter(self._unanswered.copy().values()), math.inf)
        return self._clock() - oldest > self._policy.stall_s

    def begin(self, call: object) -> None:
        """Note a call in."""
        self.calls += 1
        self._unanswered[call] = self._clock()

    def answered(self, call: object) -> None:
        """Note the first answer to a call."""
        self._unanswered.pop(call, None)

    def succeeded(self) -> None:
        """Note that a call ended well: what was before counts no more."""
        self._failures = self._faults = 0

    def end(self, call: object) -> bool:
        """Note a call out, however it ended; return whether the replica was ejected for leaving it unanswered."""
        self.calls -= 1
        began = self._unanswered.pop(call, math.inf)
        return self._clock() - began > self._policy.stall_s and self.eject()

    def faulted(self) -> bool:
        """Note that it failed at a call of which the request may be the cause; return whether it was ejected for it."""
        self._faults += 1
        return self._faults >= self._policy.faults_in_a_row and self.eject()

    def eject(self) -> bool:
        """Leave it alone for a while; return False where that is so already, as for all calls that one death breaks."""
        if self.is_ejected:
            return False
        left_alone_s = self._policy.ejection_s * 2.0 ** min(self._failures, 30)
        self._ejected_until = self._clock() + min(left_alone_s, self._policy.max_ejection_s)
        self._failures += 1
        return True
