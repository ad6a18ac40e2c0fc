"""Metrics: what may be declared, what is kept, what a scrape says."""

import asyncio
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from itertools import pairwise

import pytest

from shared.loop_lag import declared_lag, watch_loop_lag
from shared.metrics import CALLS_S, MOMENTS_S, NO_METRICS, TILES, Metric, Reading
from shared.metrics_endpoint import MetricsEndpoint
from shared.prometheus import PrometheusRegistry
from shared.store_metrics import UNOBSERVED, StoreMetrics


@pytest.mark.parametrize(
    ("name", "kind", "labels"),
    [
        ("rpc_started_total", "counter", {}),
        ("internvl_Calls_total", "counter", {}),
        ("internvl_calls", "counter", {}),
        ("internvl_calls_total", "gauge", {}),
        ("internvl_duration", "histogram", {}),
        ("internvl_duration_ms", "histogram", {}),
        *[
            ("internvl_calls_total", "counter", {label: ()})
            for label in ("digest", "tenant", "request_id", "user", "le")
        ],
    ],
)
def test_what_breaks_the_conventions_cannot_be_declared(name: str, kind: str, labels: dict[str, tuple[str]]) -> None:
    with pytest.raises(ValueError, match=name):
        Metric(name, kind, "", labels)  # type: ignore[arg-type]


def test_a_unit_is_the_end_of_a_name() -> None:
    assert Metric("internvl_x_seconds", "histogram", "").unit == "seconds"
    assert Metric("internvl_x_bytes_total", "counter", "").unit == "bytes"
    assert Metric("internvl_x_total", "counter", "").unit == ""


def test_two_registries_share_nothing() -> None:
    registries = PrometheusRegistry(), PrometheusRegistry()
    counters = [registry.counter("internvl_x_total", "X") for registry in registries]
    counters[0].inc(3)
    assert [registry.value("internvl_x_total") for registry in registries] == [3, 0]


def test_a_name_is_declared_once() -> None:
    registry = PrometheusRegistry()
    registry.counter("internvl_x_total", "X")
    with pytest.raises(ValueError, match="internvl_x"):
        registry.gauge("internvl_x", "X")


def test_series_whose_labels_are_known_exist_before_anything_happens() -> None:
    registry = PrometheusRegistry()
    registry.counter("internvl_x_total", "X", tier=("local", "store"), kind=("picture",))
    registry.counter("internvl_y_total", "Y", rpc=(), code=("OK",))
    assert registry.value("internvl_x_total", tier="store", kind="picture") == 0
    assert registry.value("internvl_y_total", rpc="A/B", code="OK") is None


def test_every_kind_keeps_what_it_is_told() -> None:
    registry = PrometheusRegistry()
    counter = registry.counter("internvl_x_total", "X", tier=("local",))
    gauge = registry.gauge("internvl_y", "Y")
    histogram = registry.histogram("internvl_z_seconds", "Z", (1.0, 2.0))
    counter.inc(tier="local")
    counter.inc(2, tier="local")
    gauge.set(5)
    gauge.add(-2)
    for value in (0.5, 1.0, 7.0):
        histogram.observe(value)
    assert registry.value("internvl_x_total", tier="local") == 3
    assert registry.value("internvl_y") == 3
    assert registry.value("internvl_z_seconds_bucket", le="1.0") == 2
    assert registry.value("internvl_z_seconds_count") == 3
    assert registry.value("internvl_z_seconds_sum") == 8.5


def test_a_gauge_that_follows_is_read_when_somebody_asks() -> None:
    registry = PrometheusRegistry()
    sizes = [1.0]
    registry.gauge("internvl_cache_bytes", "X", cache=("media",)).follow(lambda: sizes[-1], cache="media")
    sizes.append(7.0)
    assert registry.value("internvl_cache_bytes", cache="media") == 7


@dataclass(frozen=True)
class Moment:
    running: int
    done: int


def test_a_snapshot_is_one_state_and_none_before_it_is_connected() -> None:
    registry = PrometheusRegistry()
    states = iter([Moment(2, 7), Moment(0, 9)])
    readings: tuple[Reading[Moment], ...] = (
        Reading("internvl_running", "gauge", "R", lambda moment: moment.running),
        Reading("internvl_done_total", "counter", "D", lambda moment: moment.done),
    )
    snapshot = registry.snapshot(*readings)
    assert registry.value("internvl_running") is None
    snapshot.connect(lambda: next(states))
    values = {
        sample.name: sample.value
        for family in registry.exposed.collect()
        for sample in family.samples
        if sample.name.startswith("internvl")
    }
    assert values == {"internvl_running": 2, "internvl_done_total": 7}


def test_without_a_registry_everything_may_be_told_and_nothing_is_kept() -> None:
    NO_METRICS.counter("internvl_x_total", "X").inc(2, tier="local")
    NO_METRICS.gauge("internvl_x", "X").follow(lambda: 1 / 0)
    NO_METRICS.histogram("internvl_x_seconds", "X", (1.0,)).observe(1)
    reading: Reading[int] = Reading("internvl_x", "gauge", "X", lambda number: 1 / number)
    NO_METRICS.snapshot(reading).connect(lambda: 0)
    UNOBSERVED.command_ended("get", "ok")


def test_a_store_that_is_observed_is_counted() -> None:
    registry = PrometheusRegistry()
    metrics = StoreMetrics.declared(registry)
    metrics.command_ended("get", "ok")
    metrics.command_ended("get", "failed")
    metrics.breaker_changed(is_open=True)
    metrics.write_queue_changed(3, 4096)
    metrics.write_dropped("queue_full")
    metrics.cache_changed("embeddings", 99)
    metrics.cache_evicted("embeddings", 2)
    assert registry.value("internvl_store_commands_total", command="get", outcome="failed") == 1
    assert registry.value("internvl_store_breaker_open") == 1
    assert registry.value("internvl_store_write_queue_items") == 3
    assert registry.value("internvl_store_write_queue_bytes") == 4096
    assert registry.value("internvl_store_dropped_writes_total", reason="queue_full") == 1
    assert registry.value("internvl_cache_bytes", cache="embeddings") == 99
    assert registry.value("internvl_cache_evictions_total", cache="embeddings") == 2


@pytest.mark.parametrize("buckets", [CALLS_S, MOMENTS_S, TILES])
def test_buckets_ascend(buckets: tuple[float, ...]) -> None:
    assert all(low < high for low, high in pairwise(buckets))


async def test_the_lag_of_the_event_loop_is_what_a_sleep_took_too_long() -> None:
    registry, now, late_s = PrometheusRegistry(), [0.0], [0.0, 0.3, 0.0]

    async def sleep(duration_s: float) -> None:
        if not late_s:
            raise asyncio.CancelledError
        now[0] += duration_s + late_s.pop()

    with pytest.raises(asyncio.CancelledError):
        await watch_loop_lag(declared_lag(registry), sleep, lambda: now[0])
    assert registry.value("internvl_event_loop_lag_seconds_count") == 3
    assert registry.value("internvl_event_loop_lag_seconds_bucket", le="0.25") == 2
    assert registry.value("internvl_event_loop_lag_seconds_bucket", le="0.5") == 3


# The endpoint.


@pytest.fixture
def registry() -> PrometheusRegistry:
    registry = PrometheusRegistry()
    registry.counter("internvl_x_total", "How many there were").inc(3)
    return registry


@pytest.fixture
def endpoint(registry: PrometheusRegistry) -> Iterator[MetricsEndpoint]:
    with MetricsEndpoint("127.0.0.1:0", registry) as endpoint:
        yield endpoint


def ask(address: str, path: str, method: str = "GET") -> tuple[int, str]:
    connection = HTTPConnection(address, timeout=10)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def test_a_scrape_says_what_is_counted_what_it_means_and_how_the_process_does(endpoint: MetricsEndpoint) -> None:
    status, text = ask(endpoint.address, "/metrics")
    assert status == 200
    lines = text.splitlines()
    assert "# HELP internvl_x_total How many there were" in lines
    assert "# TYPE internvl_x_total counter" in lines
    assert "internvl_x_total 3.0" in lines
    assert any(line.startswith("process_open_fds ") for line in lines)
    assert "_created" not in text


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [("GET", "/", 404), ("GET", "/metrics/..", 404), ("GET", "/favicon.ico", 404), ("POST", "/metrics", 405)],
)
def test_nothing_but_metrics_is_answered(endpoint: MetricsEndpoint, method: str, path: str, expected: int) -> None:
    status, text = ask(endpoint.address, path, method)
    assert status == expected
    assert "internvl_x" not in text


def test_whoever_asks_for_nothing_and_whoever_leaves_early_hold_nobody_up(
    endpoint: MetricsEndpoint, capfd: pytest.CaptureFixture[str]
) -> None:
    host, _, port = endpoint.address.rpartition(":")
    with socket.create_connection((host, int(port))):  # silent
        for request in (b"GET /metrics HTTP/1.1\r\n\r\n", b"\x00\xff\r\n\r\n", b""):
            with socket.create_connection((host, int(port))) as rude:
                rude.sendall(request)
        assert ask(endpoint.address, "/metrics")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_a_closed_endpoint_frees_its_port(registry: PrometheusRegistry) -> None:
    with MetricsEndpoint("127.0.0.1:0", registry) as first:
        address = first.address
    with pytest.raises(OSError, match="refused"):
        ask(address, "/metrics")
    with MetricsEndpoint(address, registry) as again:
        assert ask(again.address, "/metrics")[0] == 200


def test_a_port_that_is_taken_is_an_error_that_names_the_setting(endpoint: MetricsEndpoint) -> None:
    with pytest.raises(OSError, match=rf"{endpoint.address} .*--metrics-listen"):
        MetricsEndpoint(endpoint.address, PrometheusRegistry())


def test_it_listens_where_it_is_told_and_nowhere_else() -> None:
    with MetricsEndpoint("[::1]:0", PrometheusRegistry()) as endpoint:
        port = int(endpoint.address.removeprefix("[::1]:"))
        with socket.create_connection(("::1", port)):
            pass
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port))
