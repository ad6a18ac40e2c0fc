"""The HTTP API describes itself truly: schemathesis asks real processes whatever the description allows, and more."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import StartStack
from tests.e2e.golden_cases import checkpoint_directory
from tests.golden_cases import CHECKPOINTS

pytestmark = pytest.mark.e2e
KEY = "ivl_" + "k" * 43
EXAMPLES = 25
# What a description in JSON schema cannot say: that user and assistant alternate, that a URL leads to a picture.
NOT_CHECKED = "positive_data_acceptance"


def keys_file(directory: Path) -> Path:
    """A keys file with one key."""
    key = {"name": "test", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}
    file = directory / "keys.json"
    file.write_text(json.dumps({"tenants": [{"name": "tenant", "keys": [key]}]}), encoding="utf-8")
    return file


def test_schemathesis_finds_nothing(start_stack: StartStack, tmp_path: Path) -> None:
    stack = start_stack(checkpoint_directory(CHECKPOINTS[0]), GATEWAY_KEYS_FILE=str(keys_file(tmp_path)))
    schemathesis = Path(sys.executable).with_name("schemathesis")
    arguments = ["--phases=fuzzing", f"--max-examples={EXAMPLES}", "--seed=1", "--continue-on-failure"]
    arguments += ["--checks=all", f"--exclude-checks={NOT_CHECKED}", "--no-color", "--generation-database=none"]
    done = subprocess.run(
        [
            schemathesis,
            "run",
            f"http://{stack.http_address}/openapi.json",
            f"-HAuthorization: Bearer {KEY}",
            *arguments,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "0 selected" not in done.stdout
    log = stack.processes["gateway"].log_file.read_text(encoding="utf-8")
    assert "call_failed" not in log
