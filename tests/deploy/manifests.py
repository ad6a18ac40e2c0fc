"""The rendered manifests of every overlay, as tests read them."""

import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

KUSTOMIZE = Path(__file__).parents[2] / "deploy" / "kustomize"
OVERLAYS = sorted(folder.name for folder in (KUSTOMIZE / "overlays").iterdir())
Manifest = dict[str, Any]
WORKLOADS = ("Deployment", "StatefulSet")


@cache
def rendered(overlay: str) -> str:
    """Return what an overlay renders to."""
    folder = KUSTOMIZE / "overlays" / overlay
    return subprocess.run(["kubectl", "kustomize", folder], check=True, capture_output=True, text=True).stdout


@cache
def manifests(overlay: str) -> tuple[Manifest, ...]:
    """Return an overlay's objects."""
    return tuple(yaml.safe_load_all(rendered(overlay)))


def of_kind(overlay: str, *kinds: str) -> list[Manifest]:
    """Return an overlay's objects of some kinds."""
    return [found for found in manifests(overlay) if found["kind"] in kinds]


def named(overlay: str, kind: str, name: str) -> Manifest:
    """Return the one object of a kind and name."""
    (found,) = [each for each in of_kind(overlay, kind) if each["metadata"]["name"] == name]
    return found


def pod_of(workload: Manifest) -> Manifest:
    """Return a workload's pod specification."""
    spec: Manifest = workload["spec"]["template"]["spec"]
    return spec


def containers_of(workload: Manifest) -> list[Manifest]:
    """Return all containers of a workload's pods."""
    pod = pod_of(workload)
    return [*pod.get("initContainers", []), *pod["containers"]]


def labels_of(workload: Manifest) -> dict[str, str]:
    """Return the labels of a workload's pods."""
    labels: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return labels


def environment(overlay: str, workload: Manifest) -> dict[str, str]:
    """Return the variables of a workload's main container; what Kubernetes fills in stays as it is written."""
    container = pod_of(workload)["containers"][0]
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        found |= named(overlay, "ConfigMap", source["configMapRef"]["name"])["data"]
    for variable in container.get("env", []):
        found[variable["name"]] = variable.get("value", "10.0.0.1")
    return found


def references(overlay: str) -> Iterator[tuple[str, str]]:
    """Yield kind and name of every object that a pod of the overlay needs."""
    for workload in of_kind(overlay, *WORKLOADS):
        pod = pod_of(workload)
        yield "ServiceAccount", pod["serviceAccountName"]
        yield "PriorityClass", pod["priorityClassName"]
        for volume in pod.get("volumes", []):
            if "configMap" in volume:
                yield "ConfigMap", volume["configMap"]["name"]
            if "secret" in volume:
                yield "Secret", volume["secret"]["secretName"]
            if "persistentVolumeClaim" in volume:
                yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
        for claim in pod.get("resourceClaims", []):
            if "resourceClaimName" in claim:
                yield "ResourceClaim", claim["resourceClaimName"]
            else:
                yield "ResourceClaimTemplate", claim["resourceClaimTemplateName"]
        for container in containers_of(workload):
            for source in container.get("envFrom", []):
                yield "ConfigMap", source["configMapRef"]["name"]
