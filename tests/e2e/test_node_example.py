"""The example in Node against a running system, by Node itself."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from deploy.local import LocalStack
from tests.golden_cases import GOLDEN

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/node"
PICTURE = GOLDEN / "images" / "rgb_landscape.png"


@pytest.fixture(scope="session")
def packages() -> Path:
    """What the example depends on, installed once for each lock file, outside of the repository."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not installed")
    lock = (EXAMPLE / "package-lock.json").read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "internvl-serving" / "node"
    folder = cache / hashlib.sha256(lock).hexdigest()[:16]
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=cache))
        for name in ("package.json", "package-lock.json"):
            shutil.copy(EXAMPLE / name, fresh)
        command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
        done = subprocess.run(command, cwd=fresh, capture_output=True, text=True, timeout=200, check=False)
        if done.returncode:
            shutil.rmtree(fresh)
            pytest.skip(f"npm cannot install what the example needs: {done.stderr.strip().splitlines()[-1:]}")
        try:
            fresh.rename(folder)
        except OSError:  # another run was faster
            shutil.rmtree(fresh)
    return folder / "node_modules"


@pytest.fixture
def example(tmp_path: Path, packages: Path) -> Path:
    """The example as a project of its own."""
    for file in EXAMPLE.glob("*.js*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "node_modules").symlink_to(packages)
    return tmp_path


def node(example: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"INTERNVL_PROTOS": str(ROOT / "protos")}
    return subprocess.run(
        ["node", "chat.js", *arguments],
        cwd=example,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_a_picture_is_uploaded_once_and_asked_about_twice(stack: LocalStack, example: Path) -> None:
    done = node(example, stack.address, PICTURE, "What is it?", "Say it again.")
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.split("> Say it again.")
    assert first.startswith("> What is it?\n")
    assert all(" written\n  picture: " in turn for turn in (first, second))
    assert "found in a cache" in second
    again = node(example, stack.address, PICTURE, "What is it?")
    assert (again.returncode, "found in a cache" in again.stdout) == (0, True)


def test_what_fails_is_one_line_and_an_exit_code(stack: LocalStack, example: Path) -> None:
    (example / "no.png").write_bytes(b"no picture")
    refused = node(example, stack.address, "no.png")
    assert refused.returncode == 1
    assert refused.stderr.startswith("failed: ")
    assert refused.stderr.count("\n") == 1
    assert node(example, stack.address).returncode == 2
