"""Whose turn it is: a queue that is fair to tenants, and how fast it moves."""

import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

T = TypeVar("T")
_FORGOTTEN_AT_LEAST: Final = 64
_NEWEST_SHARE: Final = 0.1  # of one more turn in how long turns are thought to take
_UNKNOWN_WAIT_S: Final = 1.0
_LONGEST_HINT_S: Final = 60.0


@dataclass(order=True, frozen=True, slots=True)
class Ticket(Generic[T]):
    """A place in a queue. `start` and `end` are in the queue's own time, which is work done and no seconds."""

    start: float
    number: int
    end: float = field(compare=False)
    tenant: str = field(compare=False)
    item: T = field(compare=False)


class FairQueue(Generic[T]):
    """Start-time fair queueing: tenants that wait get equal shares of the work, however much each has asked for.

    Every entry is tagged with the work at which its tenant's share reaches it, and the lowest tag is taken first. So a
    tenant with one entry waits for about one entry of each other tenant, and an entry behind all others belongs to the
    tenant that has asked for most.
    """

    def __init__(self) -> None:
        self._tickets: list[Ticket[T]] = []  # in order
        self._ends: dict[str, float] = {}  # up to where a tenant's share is asked for
        self._now = 0.0  # the tag of what was taken last
        self._count = 0

    def __len__(self) -> int:
        return len(self._tickets)

    def push(self, tenant: str, cost: float, item: T) -> Ticket[T]:
        """Add an item that is `cost` of work."""
        start = max(self._now, self._ends.get(tenant, 0.0))
        self._count += 1
        ticket = Ticket(start, self._count, start + cost, tenant, item)
        self._ends[tenant] = ticket.end
        insort(self._tickets, ticket)
        return ticket

    def ahead_of(self, tenant: str) -> int:
        """Return how many are in front of what the tenant would add now."""
        start = max(self._now, self._ends.get(tenant, 0.0))
        return bisect_left(self._tickets, (start, self._count + 1), key=lambda ticket: (ticket.start, ticket.number))

    def pop(self) -> T:
        """Remove the first item and return it."""
        first = self._tickets.pop(0)
        self._now = first.start
        if len(self._ends) > max(_FORGOTTEN_AT_LEAST, 2 * len(self._tickets)):
            self._ends = {tenant: end for tenant, end in self._ends.items() if end > self._now}
        return first.item

    @property
    def last(self) -> T:
        """The last item."""
        return self._tickets[-1].item

    def drop_last(self) -> T:
        """Remove the last item and return it."""
        last = self._tickets[-1]
        self.remove(last)
        return last.item

    def remove(self, ticket: Ticket[T]) -> None:
        """Remove an item, if it is there."""
        index = bisect_left(self._tickets, ticket)
        if index < len(self._tickets) and self._tickets[index] is ticket:
            del self._tickets[index]
            if self._ends.get(ticket.tenant) == ticket.end:
                self._ends[ticket.tenant] = ticket.start


class Pace:
    """How fast `places` become free, by how long turns have held them of late, and those that hold them do so far."""

    def __init__(self, places: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._places = places
        self._clock = clock
        self._mean_s: float | None = None
        self._num_running = 0
        self._began_sum_s = 0.0  # the times at which those that run began, added up
        self._promised_until = 0.0

    @property
    def turn_s(self) -> float:
        """How long a turn holds its place; a second where nobody can know."""
        return self._known_turn_s() or _UNKNOWN_WAIT_S

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Note how long a turn holds its place: as long as the context lasts."""
        began = self._clock()
        self._num_running += 1
        self._began_sum_s += began
        try:
            yield
        finally:
            self._num_running -= 1
            self._began_sum_s -= began
            self._note(self._clock() - began)

    def _note(self, held_s: float) -> None:
        known = held_s if self._mean_s is None else self._mean_s
        self._mean_s = known + _NEWEST_SHARE * (held_s - known)

    def _known_turn_s(self) -> float:
        # Turns that run already for longer than turns used to take: of a stage that stands still, none ends.
        so_far_s = self._clock() - self._began_sum_s / self._num_running if self._num_running else 0.0
        return max(self._mean_s or 0.0, so_far_s)

    def wait_s(self, ahead: int) -> float:
        """Return how long somebody waits behind `ahead` others while all places are held; 0 where nobody can know."""
        return (ahead + 1) * self._known_turn_s() / self._places

    def promise(self, waiting: int) -> float:
        """Return in how many seconds somebody who is sent away may come back, now that `waiting` others wait.

        Everybody is told a later time than the one before, as far apart as places become free: who is refused together
        must not come back together.
        """
        interval_s = self.turn_s / self._places
        now = self._clock()
        self._promised_until = max(self._promised_until, now + waiting * interval_s) + interval_s
        self._promised_until = min(self._promised_until, now + _LONGEST_HINT_S)
        return self._promised_until - now
