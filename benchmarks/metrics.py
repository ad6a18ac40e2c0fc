"""What metrics cost: per call, per measurement, per scrape; kept for Prometheus, and not kept at all.

Run `python -m benchmarks.metrics`; `--json FILE` writes the figures as well.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path

from gateway.metrics import GatewayMetrics
from llm_service.engine.engine import EngineStats
from llm_service.metrics import LlmMetrics
from shared.metrics import NO_METRICS, Registry
from shared.metrics_endpoint import MetricsEndpoint
from shared.prometheus import PrometheusRegistry
from shared.rpc.call_metrics import CallMetrics

ROUNDS = 15
CALLS = 5_000
SCRAPES = 20
RPCS = [f"ExampleService/Method{index}" for index in range(12)]
CODES = ("OK", "CANCELLED", "RESOURCE_EXHAUSTED")


def seconds_each(work: Callable[[], object], count: int) -> float:
    """Return how long `work` takes once, of `count` times in a row."""
    started = time.perf_counter()
    for _ in range(count):
        work()
    return (time.perf_counter() - started) / count


def call_of(registry: Registry) -> Callable[[], object]:
    """Return what is counted of one call."""
    metrics = CallMetrics.declared(registry)

    def call() -> None:
        metrics.start(RPCS[0])
        metrics.finish(RPCS[0], "OK", 0.1)

    return call


def first_token_of(registry: Registry) -> Callable[[], object]:
    """Return what is measured of an answer's first token: three histograms without labels."""
    metrics = LlmMetrics.declared(registry)
    return lambda: metrics.note_first_token(0.001, 0.2, 0.3)


def busy_registry() -> PrometheusRegistry:
    """Return the metrics of more than one service, after calls of every method."""
    registry = PrometheusRegistry()
    calls, llm = CallMetrics.declared(registry), LlmMetrics.declared(registry)
    GatewayMetrics.declared(registry)
    llm.engine.connect(lambda: EngineStats(1, 2, 3, 4))
    for rpc in RPCS:
        for code in CODES:
            calls.start(rpc)
            calls.finish(rpc, code, 0.1)
    return registry


def scrape_of(address: str) -> Callable[[], int]:
    """Return what asks for all metrics once, and returns the bytes of the answer."""

    def scrape() -> int:
        connection = HTTPConnection(address)
        connection.request("GET", "/metrics")
        size = len(connection.getresponse().read())
        connection.close()
        return size

    return scrape


def measured() -> dict[str, list[float]]:
    """Return the seconds of each piece of work, once per round; the pieces take turns."""
    kept, unkept = PrometheusRegistry(), NO_METRICS
    with MetricsEndpoint("127.0.0.1:0", busy_registry()) as endpoint:
        pieces: dict[str, tuple[Callable[[], object], int]] = {
            "a call, kept": (call_of(kept), CALLS),
            "a call, not kept": (call_of(unkept), CALLS),
            "a first token, kept": (first_token_of(kept), CALLS),
            "a first token, not kept": (first_token_of(unkept), CALLS),
            "a scrape": (scrape_of(endpoint.address), SCRAPES),
        }
        times: dict[str, list[float]] = {name: [] for name in pieces}
        for _ in range(ROUNDS):
            for name, (work, count) in pieces.items():
                times[name].append(seconds_each(work, count))
    return times


def main() -> None:
    """Measure, print a table, and write JSON where asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.metrics", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    results = {}
    print(f"{'what':<26}{'median':>12}{'least':>12}{'most':>12}   in microseconds, of {ROUNDS} rounds")
    for name, times in measured().items():
        median, least, most = (value * 1e6 for value in (statistics.median(times), min(times), max(times)))
        results[name] = {"median_us": median, "least_us": least, "most_us": most}
        print(f"{name:<26}{median:>12.2f}{least:>12.2f}{most:>12.2f}")
    with MetricsEndpoint("127.0.0.1:0", busy_registry()) as endpoint:
        results["scrape_bytes"] = {"bytes": scrape_of(endpoint.address)()}
    print(f"{'bytes of a scrape':<26}{results['scrape_bytes']['bytes']:>12}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
