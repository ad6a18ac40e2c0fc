"""Runs on this machine what the manifests of `prod` describe: the same settings, secrets and stores."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.kustomize.cluster_secrets import cluster_secrets
from deploy.local.service import Service
from tests.deploy.manifests import environment, named
from tests.deploy.running_store import running_store
from tests.tls_certificates import Authority

MODULES = {"vision": "vision_service", "llm": "llm_service", "gateway": "gateway"}
STAGE_NAME = "internvl-stage"
_OVERLAY, _TENANT = "prod", "backend"
# What is the cluster's to say, and is said on this machine by flags.
_ADDRESSES = re.compile(r"_(LISTEN|ADVERTISE|TARGET|MODEL)$")


@dataclass(frozen=True, slots=True)
class Production:
    """The running system: its services by kind, whom to trust, and a key that is let in."""

    services: dict[str, list[Service]]
    ca_file: Path
    api_key: str
    http_addresses: list[str]

    @property
    def gateways(self) -> list[str]:
        """Where the gateways answer gRPC."""
        return [str(service.address) for service in self.services["gateway"]]


@contextmanager
def production(model: Path, folder: Path, replicas: int = 2) -> Iterator[Production]:
    """Run gateways, vision and LLM services, `replicas` of each, and both stores, as `prod` has them."""
    made, api_key = cluster_secrets(_TENANT)
    authority = Authority(folder / "authority")
    with ExitStack() as stack:
        ports = {
            name: stack.enter_context(running_store(name, folder, made)) for name in ("embeddings", "conversations")
        }
        files = _files(folder, made, ports, authority)
        services: dict[str, list[Service]] = {}
        targets: dict[str, str] = {}
        for name in MODULES:
            flags = _flags(name, model, targets)
            services[name] = [
                stack.enter_context(
                    _running(f"{name}-{index}", name, [*flags, *_http(name, index, folder)], files, folder)
                )
                for index in range(replicas)
            ]
            _wait(lambda each: each.address is not None, services[name])
            targets[name] = ",".join(str(service.address) for service in services[name])
        _wait(Service.is_ready, [service for each in services.values() for service in each])
        https = [(folder / f"gateway-{index}.http").read_text() for index in range(replicas)]
        yield Production(services, authority.ca_file, api_key, https)


def _files(
    folder: Path, made: dict[str, dict[str, str]], ports: dict[str, int], authority: Authority
) -> dict[str, str]:
    """Write what pods mount, and return where each path of theirs is here, by its path there and the service."""
    where: dict[str, str] = {}
    for name in MODULES:
        secrets_dir = folder / f"{name}-secrets"
        secrets_dir.mkdir()
        for file, text in made[f"{name}-secrets"].items():
            for store, port in ports.items():
                text = text.replace(f"@valkey-{store}:6379", f"@127.0.0.1:{port}")
            (secrets_dir / file).write_text(text)
        where[f"{name}:/etc/internvl/secrets"] = str(secrets_dir)
        issued = authority.issue(name, STAGE_NAME, "localhost", "127.0.0.1")
        for path, file in (("tls.crt", issued.cert_file), ("tls.key", issued.key_file), ("ca.crt", issued.ca_file)):
            where[f"{name}:/etc/internvl/tls/{path}"] = str(file)
    keys = folder / "keys.json"
    keys.write_text(made["gateway-keys"]["keys.json"])
    where["gateway:/etc/internvl/keys/keys.json"] = str(keys)
    return where


def _flags(name: str, model: Path, targets: dict[str, str]) -> list[str]:
    flags = ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
    if name == "gateway":
        return [*flags, "--vision-target", targets["vision"], "--llm-target", targets["llm"]]
    return [*flags, "--model", str(model), "--device", "cpu", "--dtype", "float32"]


def _http(name: str, index: int, folder: Path) -> list[str]:
    if name != "gateway":
        return []
    return ["--http-listen", "127.0.0.1:0", "--http-address-file", str(folder / f"gateway-{index}.http")]


@contextmanager
def _running(label: str, name: str, flags: list[str], files: dict[str, str], folder: Path) -> Iterator[Service]:
    variables = environment(_OVERLAY, named(_OVERLAY, "Deployment", name))
    told = {
        key: files.get(f"{name}:{value}", value)
        for key, value in variables.items()
        if key != "POD_IP" and not _ADDRESSES.search(key)
    }
    service = Service(label, MODULES[name], flags, told, folder)
    try:
        yield service
    finally:
        service.process.stop(30)


def _wait(condition: Callable[[Service], bool], services: list[Service]) -> None:
    while not all(condition(service) for service in services):
        for service in services:
            assert service.process.exit_code is None, service.process.last_lines(20)
        time.sleep(0.1)
