"""The manifests hold together: schemas, references, probes, settings, drains, security, edges, sizes."""

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from deploy.kustomize import model_sizes
from deploy.kustomize.cluster_secrets import cluster_secrets
from gateway.settings import GatewaySettings
from llm_service.settings import LlmSettings
from shared.rpc import health
from shared.settings import ServiceSettings
from tests.deploy.custom_schemas import schema_of
from tests.deploy.manifests import (
    KUSTOMIZE,
    OVERLAYS,
    WORKLOADS,
    Manifest,
    containers_of,
    environment,
    labels_of,
    manifests,
    named,
    of_kind,
    pod_of,
    references,
    rendered,
)
from tests.tls_certificates import Authority
from vision_service.settings import VisionSettings

SERVICES: dict[str, type[ServiceSettings]] = {"gateway": GatewaySettings, "vision": VisionSettings, "llm": LlmSettings}
VERSIONS = ("1.34", "1.35", "1.36", "1.37")
PRODUCTION = ("prod", "prod-large")
# What the cluster's people bring: certificates, by cert-manager or by hand.
BROUGHT = {"edge-tls", "gateway-tls", "vision-tls", "llm-tls"}
UNITS = {"Mi": 2**20, "Gi": 2**30, "mb": 2**20, "gb": 2**30}
overlay = pytest.mark.parametrize("overlay", OVERLAYS)
COMPONENTS = sorted(folder.name for folder in (KUSTOMIZE / "components").iterdir())


@overlay
@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid(overlay: str, version: str) -> None:
    for found in manifests(overlay):
        validate(json.dumps(found), version)


@cache
def validate(manifest: str, version: str) -> None:
    """Raise where an object is not valid; overlays share most of theirs, and each is looked at once."""
    found = json.loads(manifest)
    own = schema_of(found["apiVersion"], found["kind"])
    if own:
        jsonschema.validate(found, own)
    else:
        kubernetes_validate.validate(found, version, strict=True)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_changes_the_base_to_something_valid(component: str) -> None:
    added = with_component(component)
    assert added != with_component(None)
    for found in yaml.safe_load_all(added):
        validate(json.dumps(found), VERSIONS[0])


def with_component(component: str | None) -> str:
    """Return the base with a component, and what that one builds upon."""
    before = {"small-models": ["gpu", "weights-pvc"], "large-models": ["gpu", "weights-pvc"]}.get(component or "", [])
    names = [*before, component] if component else []
    # Within the tree, because kustomize follows no path out of it.
    with tempfile.TemporaryDirectory(dir=KUSTOMIZE) as folder:
        text = {"resources": ["../base"], "components": [f"../components/{name}" for name in names]}
        (Path(folder) / "kustomization.yaml").write_text(
            yaml.safe_dump({key: each for key, each in text.items() if each})
        )
        return subprocess.run(["kubectl", "kustomize", folder], check=True, capture_output=True, text=True).stdout


def test_the_validator_finds_what_is_wrong() -> None:
    wrong = named("cpu-demo", "Deployment", "gateway") | {"spec": {"replica": 2}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


@overlay
def test_a_build_is_always_the_same(overlay: str) -> None:
    folder = KUSTOMIZE / "overlays" / overlay
    again = subprocess.run(["kubectl", "kustomize", folder], check=True, capture_output=True, text=True).stdout
    assert again == rendered(overlay)


@overlay
def test_everything_that_has_a_namespace_is_in_ours(overlay: str) -> None:
    for found in manifests(overlay):
        if found["kind"] not in ("Namespace", "PriorityClass"):
            assert found["metadata"]["namespace"] == "internvl"


@overlay
def test_every_reference_resolves(overlay: str) -> None:
    there = {(found["kind"], found["metadata"]["name"]) for found in manifests(overlay)}
    made, _ = cluster_secrets("somebody")
    there |= {("Secret", name) for name in {*made, *BROUGHT}}
    assert set(references(overlay)) <= there


@overlay
def test_services_budgets_and_scalers_find_what_they_are_for(overlay: str) -> None:
    workloads = of_kind(overlay, *WORKLOADS)
    for service in of_kind(overlay, "Service"):
        (target,) = [each for each in workloads if service["spec"]["selector"].items() <= labels_of(each).items()]
        names = {port["name"] for container in containers_of(target) for port in container.get("ports", [])}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
    for budget in of_kind(overlay, "PodDisruptionBudget"):
        selector = budget["spec"]["selector"]["matchLabels"]
        assert any(selector.items() <= labels_of(each).items() for each in workloads)
        assert "minAvailable" not in budget["spec"]
    for scaler in of_kind(overlay, "ScaledObject", "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        assert named(overlay, target["kind"], target["name"])


@overlay
def test_routes_lead_to_ports_of_services(overlay: str) -> None:
    for route in of_kind(overlay, "GRPCRoute", "HTTPRoute"):
        for backend in (each for rule in route["spec"]["rules"] for each in rule["backendRefs"]):
            ports = named(overlay, "Service", backend["name"])["spec"]["ports"]
            assert backend["port"] in {port["port"] for port in ports}


@overlay
def test_probes_ask_for_names_that_the_services_answer(overlay: str) -> None:
    known = {health.STARTUP, health.READINESS, health.LIVENESS}
    for name in SERVICES:
        (container,) = pod_of(named(overlay, "Deployment", name))["containers"]
        asked = {probe: container[probe]["grpc"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
        assert {each["service"] for each in asked.values()} == known
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert {each["port"] for each in asked.values()} == {ports["health"]}


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in SERVICES:
        for variable in [key for key in os.environ if key.startswith(f"{name.upper()}_")]:
            monkeypatch.delenv(variable)
    return monkeypatch


@overlay
@pytest.mark.parametrize("name", SERVICES)
def test_services_understand_their_environment_and_secrets(
    overlay: str, name: str, clean_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = settings_of(overlay, name, clean_environment, tmp_path)
    deployment = named(overlay, "Deployment", name)
    (container,) = pod_of(deployment)["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert settings.listen == f"0.0.0.0:{ports['grpc']}"
    assert settings.health_listen == f"0.0.0.0:{ports['health']}"
    assert settings.metrics_listen == f"0.0.0.0:{ports['metrics']}"
    assert settings.redis_url.get_secret_value().startswith(f"redis://{name}:")  # type: ignore[attr-defined]


@overlay
@pytest.mark.parametrize("name", SERVICES)
def test_a_pod_has_time_to_drain(
    overlay: str, name: str, clean_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pod = pod_of(named(overlay, "Deployment", name))
    sleep_s = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain_s = settings_of(overlay, name, clean_environment, tmp_path).drain_grace_s
    assert pod["terminationGracePeriodSeconds"] >= sleep_s + drain_s + 5


@overlay
def test_pods_are_restricted(overlay: str) -> None:
    labels = named(overlay, "Namespace", "internvl")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for workload in of_kind(overlay, *WORKLOADS):
        pod = pod_of(workload)
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        allowed = {"name", "configMap", "emptyDir", "secret", "persistentVolumeClaim", "image"}
        assert all(volume.keys() <= allowed for volume in pod["volumes"])
        for container in containers_of(workload):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


@overlay
def test_every_container_says_what_it_needs_and_is_a_version_that_somebody_chose(overlay: str) -> None:
    for workload in of_kind(overlay, *WORKLOADS):
        for container in containers_of(workload):
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys()
            assert "memory" in resources["limits"]
            pin = r"@sha256:[0-9a-f]{64}$" if overlay in PRODUCTION else r":[0-9][0-9.]*$"
            assert re.search(pin, container["image"]), container["image"]


@overlay
def test_stages_with_gpus_are_rolled_out_without_a_spare_one(overlay: str) -> None:
    for name in ("vision", "llm"):
        strategy = named(overlay, "Deployment", name)["spec"]["strategy"]["rollingUpdate"]
        assert strategy == {"maxSurge": 0, "maxUnavailable": 1}
    assert named(overlay, "Deployment", "gateway")["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


@pytest.mark.parametrize("overlay", PRODUCTION)
def test_the_gateway_has_no_gpu_and_each_stage_has_nodes_of_its_own(overlay: str) -> None:
    gpus = {name: gpus_of(named(overlay, "Deployment", name)) for name in SERVICES}
    assert gpus["gateway"] == 0
    assert min(gpus["vision"], gpus["llm"]) >= 1
    for name in ("vision", "llm"):
        assert pod_of(named(overlay, "Deployment", name))["nodeSelector"] == {"internvl-serving/pool": name}


@overlay
def test_only_the_calls_that_are_documented_can_be_made(overlay: str) -> None:
    assert set(edges(overlay)) == documented_edges(with_metrics=overlay in PRODUCTION)


@overlay
def test_nobody_talks_who_is_not_named(overlay: str) -> None:
    denied = named(overlay, "NetworkPolicy", "default-deny")["spec"]
    assert denied == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


@pytest.mark.parametrize("size_class", model_sizes.CLASSES, ids=lambda each: each.name)
def test_sizes_are_what_the_released_tensors_ask_for(size_class: model_sizes.SizeClass) -> None:
    written = KUSTOMIZE / "components" / size_class.name / "kustomization.yaml"
    assert written.read_text() == model_sizes.component(size_class)


def test_every_released_model_is_in_one_size_class() -> None:
    names = [model.name for size_class in model_sizes.CLASSES for model in size_class.models()]
    assert len(names) == len(set(names)) == 21


@overlay
def test_a_stores_memory_leaves_room_in_its_pod(overlay: str) -> None:
    for workload in of_kind(overlay, "StatefulSet"):
        (container,) = containers_of(workload)
        (mounted,) = [each["configMap"]["name"] for each in pod_of(workload)["volumes"] if "configMap" in each]
        config = named(overlay, "ConfigMap", mounted)["data"]["valkey.conf"]
        (most,) = re.findall(r"^maxmemory (\w+)$", config, re.M)
        assert in_bytes(most) <= 0.75 * in_bytes(container["resources"]["limits"]["memory"])
        kept = workload["metadata"]["name"] == "valkey-conversations"
        assert ("maxmemory-policy noeviction" in config) is kept
        assert ("appendonly yes" in config) is kept


def settings_of(overlay: str, name: str, patch: pytest.MonkeyPatch, folder: Path) -> Any:
    """Return the settings that a service gets in its pod."""
    secrets_dir = folder / "secrets"
    secrets_dir.mkdir()
    for file, text in cluster_secrets("somebody")[0][f"{name}-secrets"].items():
        (secrets_dir / file).write_text(text)
    variables = environment(overlay, named(overlay, "Deployment", name))
    assert {key for key in variables if not key.startswith(f"{name.upper()}_")} <= {"POD_IP", "INTERNVL_SECRETS_DIR"}
    model = folder / "model"
    model.mkdir()
    (folder / "keys.json").write_text(cluster_secrets("somebody")[0]["gateway-keys"]["keys.json"])
    authority = Authority(folder / "authority")
    issued = authority.issue(name)
    mounted = {
        "/models/model": model,
        "/etc/internvl/keys/keys.json": folder / "keys.json",
        "/etc/internvl/tls/tls.crt": issued.cert_file,
        "/etc/internvl/tls/tls.key": issued.key_file,
        "/etc/internvl/tls/ca.crt": issued.ca_file,
    }
    for key, text in variables.items():
        patch.setenv(key, str(mounted.get(text, text)).replace("$(POD_IP)", "10.0.0.1"))
    patch.setenv("INTERNVL_SECRETS_DIR", str(secrets_dir))
    return SERVICES[name].from_command_line(name, [])


def gpus_of(workload: Manifest) -> int:
    return sum(int(each["resources"]["limits"].get("nvidia.com/gpu", 0)) for each in containers_of(workload))


def edges(overlay: str) -> Iterator[tuple[str, str, int]]:
    """Yield caller, callee and port of every call that somebody's ingress and, inside, egress allows."""
    policies = [each["spec"] for each in of_kind(overlay, "NetworkPolicy") if each["metadata"]["name"] != "dns"]
    for policy in policies:
        for callee in selected(policy["podSelector"]):
            for rule in policy.get("ingress", []):
                for caller in (peer for each in rule["from"] for peer in peers(each)):
                    for port in rule["ports"]:
                        assert caller not in SERVICES or may_leave(policies, caller, callee, port["port"])
                        yield caller, callee, port["port"]


def may_leave(policies: list[Manifest], caller: str, callee: str, port: int) -> bool:
    return any(
        callee in [peer for each in rule["to"] for peer in peers(each)]
        and {"protocol": "TCP", "port": port} in rule["ports"]
        for policy in policies
        if caller in selected(policy["podSelector"])
        for rule in policy.get("egress", [])
    )


def selected(selector: Manifest) -> list[str]:
    if "matchExpressions" in selector:
        return [str(value) for value in selector["matchExpressions"][0]["values"]]
    labels = selector.get("matchLabels", {})
    return [labels["app.kubernetes.io/name"]] if labels else []


def peers(peer: Manifest) -> list[str]:
    if "podSelector" in peer:
        return selected(peer["podSelector"])
    labels = peer.get("namespaceSelector", {}).get("matchLabels", {})
    known = {
        ("internvl-serving/clients", "true"): "clients",
        ("internvl-serving/edge", "true"): "edge",
        ("kubernetes.io/metadata.name", "monitoring"): "monitoring",
    }
    return [known[pair] for pair in labels.items()]


def documented_edges(*, with_metrics: bool) -> set[tuple[str, str, int]]:
    """Return the calls that docs/operations.md lists; edge and monitoring come with components."""
    text = (KUSTOMIZE.parents[1] / "docs/operations.md").read_text()
    rows = re.findall(r"^\| ([\w-]+) \| ([\w-]+) \| (\d+) \|", text, re.M)
    found = {(caller, callee, int(port)) for caller, callee, port in rows}
    return {edge for edge in found if with_metrics or edge[0] not in ("edge", "monitoring")}


def in_bytes(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(\w\w)", text).groups()  # type: ignore[union-attr]
    return int(number) * UNITS[unit]
