"""Dashboards, alerts and scaling ask only for metrics that the services export."""

import json
import re
import shutil
import subprocess
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.grafana import dashboards

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/metrics.md").read_text()
_SUFFIXES = r"(_bucket|_sum|_count)?$"


def documented_metrics() -> set[str]:
    return set(re.findall(r"^\| `(internvl_\w+)` \|", DOCUMENT, re.M))


def documented_labels(metric: str) -> set[str]:
    (cell,) = re.findall(rf"^\| `{metric}` \| \w+ \| ([^|]*) \|", DOCUMENT, re.M)
    return set(re.findall(r"`(\w+)`", cell))


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((ROOT / "deploy/prometheus/rules.yaml").read_text())["spec"]["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def documented_alerts() -> dict[str, str]:
    rows = re.findall(r"^\| (\w+) \| `(.*)` \| .* \|$", DOCUMENT.partition("## Alerts")[2], re.M)
    return {name: expression.replace(r"\|", "|") for name, expression in rows}


def queries() -> list[str]:
    charts = [target["expr"] for panel in panels() for target in panel["targets"]]
    triggers = chain.from_iterable(each["spec"]["triggers"] for each in scaled_objects())
    return [*charts, *(rule["expr"] for rule in rules()), *(each["metadata"]["query"] for each in triggers)]


def scaled_objects() -> list[dict[str, Any]]:
    files = (ROOT / "deploy/kustomize/components/keda").glob("*.yaml")
    found = [yaml.safe_load(file.read_text()) for file in sorted(files)]
    return [each for each in found if each["kind"] == "ScaledObject"]


def panels() -> list[dict[str, Any]]:
    found = (json.loads((ROOT / f"deploy/grafana/{name}.json").read_text()) for name in dashboards.DASHBOARDS)
    return [panel for each in found for panel in each["panels"]]


def metrics_in(query: str) -> set[str]:
    return {re.sub(_SUFFIXES, "", name) for name in re.findall(r"internvl_\w+", query)}


@pytest.mark.parametrize("query", queries())
def test_a_query_asks_for_metrics_and_labels_that_there_are(query: str) -> None:
    names = metrics_in(query)
    assert names
    assert names <= documented_metrics()
    grouped = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", query))))
    selected = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query))
    known = {"le", "instance", "job"}.union(*(documented_labels(name) for name in names))
    assert grouped | selected <= known


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool (Debian's package prometheus) is not here")
def test_prometheus_takes_the_rules(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "internvl-serving", "rules": rules()}]}))
    done = subprocess.run(["promtool", "check", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{len(rules())} rules found" in done.stdout


def test_dashboards_are_what_their_script_writes() -> None:
    for name in dashboards.DASHBOARDS:
        assert (ROOT / f"deploy/grafana/{name}.json").read_text() == dashboards.text(name)


def test_panels_of_a_dashboard_do_not_overlap() -> None:
    for name in dashboards.DASHBOARDS:
        taken: set[tuple[int, int]] = set()
        for panel in dashboards.dashboard(name)["panels"]:
            place = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & taken
            assert max(x for x, _ in cells) < 24
            taken |= cells


def test_alerts_are_those_of_the_document_and_each_has_a_remedy() -> None:
    assert {rule["alert"]: rule["expr"] for rule in rules()} == documented_alerts()
    operations = (ROOT / "docs/operations.md").read_text()
    assert set(re.findall(r"^\| ([A-Z]\w+[a-z]\w+) \|", operations.partition("## Alerts")[2], re.M)) == {
        rule["alert"] for rule in rules()
    }
