"""What services count and measure, wherever it goes: metrics, the registry that declares them, and one that keeps none.

Nothing here knows Prometheus; `shared.prometheus` does.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, Literal, Protocol, TypeVar

T = TypeVar("T")
Kind = Literal["counter", "gauge", "histogram"]

# What may tell the series of a metric apart: words of the code's own, few of each. Never a digest, a tenant or an id.
LABELS: Final = frozenset({"cache", "code", "command", "kind", "outcome", "reason", "rpc", "scope", "state", "tier"})
UNITS: Final = ("seconds", "bytes", "tiles", "tokens", "sequences", "blocks", "items")
_NAME: Final = re.compile(r"internvl(_[a-z]+)+")

MOMENTS_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
CALLS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TILES: Final = (1.0, 2.0, 4.0, 7.0, 13.0, 16.0, 32.0, 64.0, 128.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """What a metric is called and means. `labels` are the values that each label takes; none: as they come.

    Raises `ValueError` for what breaks the conventions: it is a mistake in our own code.
    """

    name: str
    kind: Kind
    meaning: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"{self.name}: internvl_ and words of lower case letters, joined by _")
        if (self.kind == "counter") != self.name.endswith("_total"):
            raise ValueError(f"{self.name}: counters, and only they, end in _total")
        if self.kind == "histogram" and not self.unit:
            raise ValueError(f"{self.name}: a histogram ends in its unit")
        if unknown := sorted(self.labels.keys() - LABELS):
            raise ValueError(f"{self.name}: no metric may have the label {', '.join(unknown)}")

    @property
    def unit(self) -> str:
        """What one of it is, as the name's end says; empty: a count of what the name says."""
        last = self.name.removesuffix("_total").rpartition("_")[2]
        return last if last in UNITS else ""


class Counter(Protocol):
    """A number that only grows. For any thread; never raises for what was declared."""

    def inc(self, amount: float = 1, **labels: str) -> None:
        """Add to it."""


class Gauge(Protocol):
    """A number that goes up and down. For any thread."""

    def set(self, value: float, **labels: str) -> None:
        """Make it `value`."""

    def add(self, amount: float, **labels: str) -> None:
        """Add to it; less than nothing takes away."""

    def follow(self, read: Callable[[], float], **labels: str) -> None:
        """From now on read it from `read` whenever somebody asks, on that asker's thread; `read` must not raise."""


class Histogram(Protocol):
    """How often what was measured was how large. For any thread."""

    def observe(self, value: float, **labels: str) -> None:
        """Count one measurement."""


@dataclass(frozen=True, slots=True)
class Reading(Generic[T]):
    """A metric without labels that is read off a state of type `T`."""

    name: str
    kind: Literal["counter", "gauge"]
    meaning: str
    value: Callable[[T], float]


class Snapshot(Generic[T]):
    """Metrics that are read off one state, together, when somebody asks. There are none before `connect`."""

    def __init__(self, readings: Sequence[Reading[T]]) -> None:
        self.readings = tuple(readings)
        self._take: Callable[[], T] | None = None

    def connect(self, take: Callable[[], T]) -> None:
        """Say how the state is come by; `take` is called on any thread and must not raise."""
        self._take = take

    def values(self) -> list[float]:
        """Return the value of every reading, in their order; none before `connect`."""
        if self._take is None:
            return []
        state = self._take()
        return [reading.value(state) for reading in self.readings]


@dataclass(frozen=True, slots=True)
class Exposition:
    """Every metric as whoever collects them reads it."""

    content: bytes
    content_type: str


class Registry(Protocol):
    """Where metrics are declared, each name once. `labels` are label=values; no values: as they come.

    The series of a metric all of whose values are known exist, at zero, from the declaration on.
    """

    def counter(self, name: str, meaning: str, **labels: Iterable[str]) -> Counter:
        """Declare a counter."""

    def gauge(self, name: str, meaning: str, **labels: Iterable[str]) -> Gauge:
        """Declare a gauge."""

    def histogram(self, name: str, meaning: str, buckets: Sequence[float], **labels: Iterable[str]) -> Histogram:
        """Declare a histogram; `buckets` are upper bounds, ascending, of which infinity is left out."""

    def snapshot(self, *readings: Reading[T]) -> Snapshot[T]:
        """Declare metrics that are read off one state."""

    def exposition(self) -> Exposition | None:
        """Return all metrics as they are now; None where none are kept. For any thread; takes milliseconds."""


class _Unkept:
    """A metric of every kind that nobody will ask for."""

    def inc(self, amount: float = 1, **labels: str) -> None:
        """Keep nothing."""

    def set(self, value: float, **labels: str) -> None:
        """Keep nothing."""

    def add(self, amount: float, **labels: str) -> None:
        """Keep nothing."""

    def follow(self, read: Callable[[], float], **labels: str) -> None:
        """Keep nothing."""

    def observe(self, value: float, **labels: str) -> None:
        """Keep nothing."""


class NoRegistry:
    """The registry of a service that nobody asks for its metrics, and of tests."""

    def counter(self, name: str, meaning: str, **labels: Iterable[str]) -> Counter:
        """Return a counter that keeps nothing."""
        return _UNKEPT

    def gauge(self, name: str, meaning: str, **labels: Iterable[str]) -> Gauge:
        """Return a gauge that keeps nothing."""
        return _UNKEPT

    def histogram(self, name: str, meaning: str, buckets: Sequence[float], **labels: Iterable[str]) -> Histogram:
        """Return a histogram that keeps nothing."""
        return _UNKEPT

    def snapshot(self, *readings: Reading[T]) -> Snapshot[T]:
        """Return a snapshot that nobody takes."""
        return Snapshot(readings)

    def exposition(self) -> None:
        """Return nothing."""


_UNKEPT: Final = _Unkept()
NO_METRICS: Final = NoRegistry()

CommandOutcome = Literal["ok", "refused", "failed", "skipped"]
DropReason = Literal["queue_full", "refused", "failed", "breaker_open", "closing"]
CacheName = Literal["embeddings"]


class StoreObserver(Protocol):
    """Is told what a store and the caches in front of it do. For any thread; never raises."""

    def command_ended(self, command: str, outcome: CommandOutcome) -> None:
        """Note a command by its name, such as `get`.

        Outcomes: the server answered; it refused; it did not answer, or not in time; an open breaker kept it back.
        """

    def breaker_changed(self, *, is_open: bool) -> None:
        """Note that the breaker has opened or closed."""

    def write_queue_changed(self, items: int, size_bytes: int) -> None:
        """Note how much waits to be written."""

    def write_dropped(self, reason: DropReason) -> None:
        """Note a value that will not be written."""

    def cache_changed(self, cache: CacheName, size_bytes: int) -> None:
        """Note how much a cache in memory holds."""

    def cache_evicted(self, cache: CacheName, count: int = 1) -> None:
        """Note entries that had to go so that others fit; not those that were replaced or erased."""
