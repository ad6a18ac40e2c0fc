"""docs/metrics.md lists what the services register, and its alerts ask for nothing else."""

import re
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from shared.loop_lag import declared_lag
from shared.metrics import LABELS, Metric
from shared.prometheus import PrometheusRegistry
from shared.rpc.call_metrics import CallMetrics
from tests.golden_cases import GOLDEN

DOCUMENT = (Path(__file__).parents[1] / "docs/metrics.md").read_text()
CHECKPOINT = GOLDEN / "checkpoints" / "internvl3-8b-tiny"
SECTIONS = {
    "gateway": ("Every service", "Gateway"),
    "vision": ("Every service", "Vision service", "Embedding store and its caches"),
    "llm": ("Every service", "LLM service", "Embedding store and its caches"),
}
# Of its own: what would name a client, a medium or a request, of which there is no end.
ENDLESS = ("digest", "tenant", "id", "request_id", "user", "conversation", "address", "model")


class Row(NamedTuple):
    """A metric as the document has it."""

    name: str
    kind: str
    labels: str
    unit: str
    meaning: str


def cells(section: str) -> Iterator[list[str]]:
    """The cells of the first table of a section, without its head."""
    _, _, rest = DOCUMENT.partition(f"\n## {section}\n")
    body = rest.partition("\n## ")[0]
    for line in [line for line in body.splitlines() if line.startswith("|")][2:]:
        yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]


def row_of(metric: Metric) -> Row:
    labels = [f"`{label}`" + (": " + ", ".join(values) if values else "") for label, values in metric.labels.items()]
    return Row(f"`{metric.name}`", metric.kind, "; ".join(labels) or "-", metric.unit or "-", metric.meaning)


def lifespan_of(service: str, registry: PrometheusRegistry) -> AbstractAsyncContextManager[Any]:
    """A service that is put together, but not warmed up."""
    if service == "gateway":
        from gateway import app as gateway
        from gateway.settings import GatewaySettings

        settings = GatewaySettings(vision_target="127.0.0.1:1", llm_target="127.0.0.1:1")
        return gateway.lifespan(settings, "here:1", registry)
    if service == "vision":
        from vision_service import app as vision
        from vision_service.settings import VisionSettings

        return vision.lifespan(VisionSettings(model=CHECKPOINT), "here:1", registry)
    from llm_service import app as llm
    from llm_service.settings import LlmSettings

    return llm.lifespan(LlmSettings(model=CHECKPOINT), "here:1", registry)


async def registered(service: str) -> tuple[Metric, ...]:
    """Everything that a service registers, what its server does included."""
    registry = PrometheusRegistry()
    CallMetrics.declared(registry)
    declared_lag(registry)
    async with lifespan_of(service, registry):
        return registry.declared


@pytest.mark.parametrize("service", SECTIONS)
async def test_the_document_lists_what_a_service_registers_and_no_more(service: str) -> None:
    documented = [Row(*row[:5]) for section in SECTIONS[service] for row in cells(section)]
    assert sorted(documented) == sorted(map(row_of, await registered(service)))


@pytest.mark.parametrize("service", SECTIONS)
async def test_no_metric_has_a_label_without_an_end(service: str) -> None:
    assert not LABELS.intersection(ENDLESS)
    for metric in await registered(service):
        assert metric.labels.keys() <= LABELS, metric.name


def test_alerts_and_the_metrics_that_serve_them_name_each_other() -> None:
    sections = list(dict.fromkeys(section for service in SECTIONS.values() for section in service))
    serving = {row[0].strip("`"): row[5].split(", ") for section in sections for row in cells(section)}
    used = {}
    for name, expression, _ in cells("Alerts"):
        found = re.findall(r"internvl_[a-z_]+", expression)
        used[name] = {re.sub(r"_(bucket|sum|count)$", "", each) for each in found}
    said = {alert: {metric for metric, alerts in serving.items() if alert in alerts} for alert in used}
    assert used == said
    assert {alert for alerts in serving.values() for alert in alerts} - {"-"} == used.keys()
