"""What one process says, another one reads; and nobody waits for one that has ended."""

import subprocess
import sys
from pathlib import Path

import pytest

from shared import busy_sign
from shared.busy_sign import BusySign
from shared.errors import CheckpointError

_RAISES = """
import sys
from pathlib import Path
from shared.busy_sign import BusySign
with BusySign(Path(sys.argv[1])).raised():
    print("raised", flush=True)
    sys.stdin.readline()
print("lowered", flush=True)
sys.stdin.readline()
"""


def test_another_process_is_seen_to_be_at_work_and_to_have_ended(tmp_path: Path) -> None:
    path = tmp_path / "neighbour"
    sign = BusySign(path)
    assert not sign.is_raised()
    with subprocess.Popen(
        [sys.executable, "-c", _RAISES, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "raised\n"
        assert sign.is_raised()
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == "lowered\n"
        assert not sign.is_raised()
        other.stdin.write("\n")


def test_the_last_of_several_lowers_it(tmp_path: Path) -> None:
    sign, reader = BusySign(tmp_path / "neighbour"), BusySign(tmp_path / "neighbour")
    with sign.raised():
        with sign.raised():
            pass
        assert reader.is_raised()
    assert not reader.is_raised()


def test_one_that_failed_has_lowered_it(tmp_path: Path) -> None:
    sign = BusySign(tmp_path / "neighbour")
    with pytest.raises(ValueError, match="of the tower"), sign.raised():
        raise ValueError("of the tower")
    assert not sign.is_raised()


def test_one_that_was_killed_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sign = BusySign(tmp_path / "neighbour")
    with sign.raised():
        now = busy_sign.time.monotonic()
        monkeypatch.setattr(busy_sign.time, "monotonic", lambda: now + 59)
        assert sign.is_raised()
        monkeypatch.setattr(busy_sign.time, "monotonic", lambda: now + 61)
        assert not sign.is_raised()


def test_a_file_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--neighbour-file: .*/none/file: No such file"):
        BusySign.at(tmp_path / "none/file")
    assert BusySign.at(None) is None
