"""The README's Python runs as it stands, against a running system."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.local import LocalStack

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]


def test_the_readmes_client_code_runs(stack: LocalStack, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "cat.jpg").write_bytes((ROOT / "examples/nano/pictures/shapes.png").read_bytes())
    program = code.replace("127.0.0.1:50051", stack.address)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Receipt(" in done.stdout
