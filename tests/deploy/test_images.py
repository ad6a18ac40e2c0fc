"""What the Dockerfiles do, done here without a container engine: the same files, install and start commands."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SERVICES = {"gateway": "gateway", "vision": "vision_service", "llm": "llm_service"}
TINY = ROOT / "tests/golden/checkpoints/internvl3-8b-tiny"
FLAGS = {
    "gateway": ["--vision-target", "127.0.0.1:1", "--llm-target", "127.0.0.1:1"],
    "vision": ["--model", str(TINY)],
    "llm": ["--model", str(TINY), "--kv-cache-bytes", str(16 << 20)],
}
# Everything read-only but a place for temporary files, no network but loopback, no capability, nobody's user.
# Python itself may live in root's home, where nobody else may look: it is mounted where it was, without the rest.
CONTAINED = """
set -e
ip link set lo up
base=$1
shift
if ! setpriv --reuid 10001 --regid 10001 --clear-groups test -r "$base/bin"; then
  top=/$(echo "$base" | cut -d/ -f2)
  mount --bind "$base" /mnt
  mount -t tmpfs -o mode=755 tmpfs "$top"
  mkdir -p "$base"
  mount --move /mnt "$base"
fi
mount -o remount,bind,ro /
mount -t tmpfs -o mode=1777 tmpfs /mnt
exec setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs --bounding-set=-all "$@"
"""
needs_namespaces = pytest.mark.skipif(
    os.getuid() != 0 or not all(map(shutil.which, ("unshare", "setpriv", "ip"))),
    reason="a process can be shut off from network and disk by root only, with util-linux and iproute2",
)


def instructions(name: str) -> list[tuple[str, str]]:
    text = (ROOT / f"deploy/docker/{name}.Dockerfile").read_text()
    joined = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.M))
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined.splitlines() if line.strip()]


def values(name: str, instruction: str) -> list[str]:
    return [value for found, value in instructions(name) if found == instruction]


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_is_built_in_stages_and_runs_as_nobody(name: str) -> None:
    assert len(values(name, "FROM")) == 2
    assert values(name, "USER") == ["10001:10001"]
    assert json.loads(values(name, "ENTRYPOINT")[0]) == ["python", "-m", SERVICES[name]]


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_installs_extras_that_there_are_by_the_pinned_versions(name: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (install,) = [line for line in values(name, "RUN") if '".[' in line]
    assert "-c constraints.txt" in install
    (named,) = re.findall(r'"\.\[([\w,]+)\]"', install)
    assert set(named.split(",")) <= extras.keys()
    assert "decord" not in named


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_copied_into_an_image_exists_and_is_not_ignored(name: str) -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in values(name, "COPY"):
        if not line.startswith("--from"):
            sources = line.split()[:-1]
            assert set(sources) <= kept
            assert all((ROOT / source).exists() for source in sources)


@pytest.fixture(scope="module")
def gateway_image() -> Iterator[Path]:
    """The environment that the gateway's Dockerfile makes, elsewhere than in /opt."""
    folder = Path(tempfile.mkdtemp(prefix="internvl-image-", dir="/var/tmp"))
    folder.chmod(0o755)
    try:
        source, built = folder / "source", folder / "internvl"
        for line in values("gateway", "COPY"):
            if not line.startswith("--from"):
                copy(line.split(), source)
        venv.create(built, with_pip=True)
        for command in values("gateway", "RUN"):
            if "pip install" in command:
                parts = [part.replace("/opt/internvl", str(built)) for part in shlex.split(command)]
                subprocess.run([*parts, "--quiet"], cwd=source, check=True, capture_output=True)
        yield built
    finally:
        shutil.rmtree(folder)


def copy(paths: list[str], folder: Path) -> None:
    *sources, target = paths
    for source in sources:
        at = folder / (Path(source).name if target == "./" else target)
        at.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, at, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, at)


def contained(python: Path, name: str, environment: dict[str, str]) -> Any:
    script = Path(__file__).with_name("contained.py")
    command = [str(python), str(script), SERVICES[name], *FLAGS[name]]
    done = subprocess.run(
        ["unshare", "--net", "--mount", "sh", "-c", CONTAINED, "sh", sys.base_prefix, *command],
        cwd="/",
        env=environment
        | {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": "/mnt"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_namespaces
def test_the_gateways_image_has_no_torch_and_runs_without_network_or_a_disk_to_write(gateway_image: Path) -> None:
    python = gateway_image / "bin" / "python"
    for absent in ("torch", "transformers", "PIL"):
        assert subprocess.run([python, "-c", f"import {absent}"], capture_output=True).returncode != 0
    facts = contained(python, "gateway", {})
    # Alive, but not ready: there is no LLM service here.
    assert facts["health"]["liveness"] == "SERVING"
    assert facts["health"]["readiness"] == "NOT_SERVING"
    assert (facts["exit_code"], facts["user"], facts["can_write"], facts["has_network"]) == (0, 10001, False, False)


@needs_namespaces
@pytest.mark.parametrize("name", ["vision", "llm"])
def test_a_stage_runs_without_network_or_a_disk_to_write(name: str) -> None:
    facts = contained(Path(sys.executable), name, {"PYTHONPATH": f"{ROOT}:{ROOT}/protos/gen"})
    assert facts["health"]["liveness"] == "SERVING"
    assert (facts["exit_code"], facts["user"], facts["can_write"], facts["has_network"]) == (0, 10001, False, False)
