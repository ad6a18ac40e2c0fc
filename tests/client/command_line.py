"""Runs the `internvl` command in this process."""

import sys
from pathlib import Path
from typing import Any

import pytest

from internvl_client import cli


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> tuple[Any, ...]:
    """Run the command; return exit code or message, and what it printed."""
    monkeypatch.setattr(sys, "argv", ["internvl", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, capsys.readouterr().out
