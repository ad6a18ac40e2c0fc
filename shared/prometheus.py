"""Metrics kept for Prometheus: the registry behind `shared.metrics`. This module and the endpoint know Prometheus."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Generic, TypeVar

import prometheus_client
from prometheus_client.core import CollectorRegistry, CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from shared.metrics import Counter, Exposition, Gauge, Histogram, Kind, Metric, Reading, Snapshot

T = TypeVar("T")
M = TypeVar("M", bound=MetricWrapperBase)
_Family = CounterMetricFamily | GaugeMetricFamily
_Labels = Mapping[str, Iterable[str]]


class PrometheusRegistry:
    """Keeps the metrics of a process; see `Registry`. `exposed` is what Prometheus' own code reads them from.

    Beside what is declared it exposes the process's memory, processor time and open files, as `process_*`.
    """

    def __init__(self) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nobody asks for
        self.exposed = CollectorRegistry()
        self._declared: list[Metric] = []
        prometheus_client.ProcessCollector(registry=self.exposed)

    @property
    def declared(self) -> tuple[Metric, ...]:
        """Everything that was declared, in order."""
        return tuple(self._declared)

    def value(self, name: str, **labels: str) -> float | None:
        """Return the value of one series, None where there is none; a histogram's are named as in `x_seconds_count`."""
        return self.exposed.get_sample_value(name, labels)

    def counter(self, name: str, meaning: str, **labels: Iterable[str]) -> Counter:
        """Declare a counter."""
        metric = self._declare(name, "counter", meaning, labels)
        return _Counter(prometheus_client.Counter(name, meaning, metric.labels, registry=self.exposed), metric)

    def gauge(self, name: str, meaning: str, **labels: Iterable[str]) -> Gauge:
        """Declare a gauge."""
        metric = self._declare(name, "gauge", meaning, labels)
        return _Gauge(prometheus_client.Gauge(name, meaning, metric.labels, registry=self.exposed), metric)

    def histogram(self, name: str, meaning: str, buckets: Sequence[float], **labels: Iterable[str]) -> Histogram:
        """Declare a histogram."""
        metric = self._declare(name, "histogram", meaning, labels)
        kept = prometheus_client.Histogram(name, meaning, metric.labels, registry=self.exposed, buckets=buckets)
        return _Histogram(kept, metric)

    def snapshot(self, *readings: Reading[T]) -> Snapshot[T]:
        """Declare metrics that are read off one state."""
        for reading in readings:
            self._declare(reading.name, reading.kind, reading.meaning, {})
        snapshot = Snapshot(readings)
        self.exposed.register(_SnapshotCollector(snapshot))
        return snapshot

    def exposition(self) -> Exposition:
        """Return all metrics as they are now, in Prometheus' text format."""
        return Exposition(prometheus_client.generate_latest(self.exposed), prometheus_client.CONTENT_TYPE_LATEST)

    def _declare(self, name: str, kind: Kind, meaning: str, labels: _Labels) -> Metric:
        metric = Metric(name, kind, meaning, {label: tuple(values) for label, values in labels.items()})
        self._declared.append(metric)
        return metric


class _Series(Generic[M]):
    """The series of one metric by the values of their labels."""

    def __init__(self, kept: M, metric: Metric) -> None:
        self._kept: M = kept
        self._found: dict[tuple[tuple[str, str], ...], M] = {}
        for values in product(*metric.labels.values()):
            self._of(dict(zip(metric.labels, values, strict=True)))

    def _of(self, labels: Mapping[str, str]) -> M:
        if not labels:
            return self._kept
        key = (*labels.items(),)
        series = self._found.get(key)  # the library's own way to them takes several microseconds
        if series is None:
            series = self._found[key] = self._kept.labels(**labels)
        return series


class _Counter(_Series[prometheus_client.Counter]):
    def inc(self, amount: float = 1, **labels: str) -> None:
        self._of(labels).inc(amount)


class _Gauge(_Series[prometheus_client.Gauge]):
    def set(self, value: float, **labels: str) -> None:
        self._of(labels).set(value)

    def add(self, amount: float, **labels: str) -> None:
        self._of(labels).inc(amount)

    def follow(self, read: Callable[[], float], **labels: str) -> None:
        self._of(labels).set_function(read)


class _Histogram(_Series[prometheus_client.Histogram]):
    def observe(self, value: float, **labels: str) -> None:
        self._of(labels).observe(value)


class _SnapshotCollector(Collector, Generic[T]):
    """Reads a snapshot whenever Prometheus asks."""

    def __init__(self, snapshot: Snapshot[T]) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterator[_Family]:
        """Yield what there may be."""
        return map(_family, self._snapshot.readings)

    def collect(self) -> Iterator[_Family]:
        """Yield what there is."""
        for reading, value in zip(self._snapshot.readings, self._snapshot.values(), strict=False):
            family = _family(reading)
            family.add_metric([], value)
            yield family


def _family(reading: Reading[T]) -> _Family:
    kind = CounterMetricFamily if reading.kind == "counter" else GaugeMetricFamily
    return kind(reading.name, reading.meaning, labels=[])
