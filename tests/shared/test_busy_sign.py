"""What one process says, another one reads; and nobody waits for one that has ended."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from shared import busy_sign
from shared.busy_sign import BusySign, Side
from shared.errors import CheckpointError

_RAISES = """
import sys
from pathlib import Path
from shared.busy_sign import BusySign, Side
with BusySign(Path(sys.argv[1]), Side.VISION).raised():
    print("raised", flush=True)
    sys.stdin.readline()
print("lowered", flush=True)
sys.stdin.readline()
"""


def both_in(directory: Path) -> tuple[BusySign, BusySign]:
    """Return the signs of both sides in one file."""
    return BusySign(directory / "neighbour", Side.VISION), BusySign(directory / "neighbour", Side.LANGUAGE)


def test_another_process_is_seen_to_be_at_work_and_to_have_ended(tmp_path: Path) -> None:
    path = tmp_path / "neighbour"
    sign = BusySign(path, Side.LANGUAGE)
    assert not sign.neighbour_is_busy()
    with subprocess.Popen(
        [sys.executable, "-c", _RAISES, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "raised\n"
        assert sign.neighbour_is_busy()
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == "lowered\n"
        assert not sign.neighbour_is_busy()
        other.stdin.write("\n")


def test_the_last_of_several_lowers_it(tmp_path: Path) -> None:
    sign, reader = both_in(tmp_path)
    with sign.raised():
        with sign.raised():
            pass
        assert reader.neighbour_is_busy()
    assert not reader.neighbour_is_busy()


def test_one_that_failed_has_lowered_it(tmp_path: Path) -> None:
    sign, reader = both_in(tmp_path)
    with pytest.raises(ValueError, match="of the tower"), sign.raised():
        raise ValueError("of the tower")
    assert not reader.neighbour_is_busy()


def test_one_that_was_killed_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sign, reader = both_in(tmp_path)
    with sign.raised():
        now = busy_sign.time.monotonic()
        monkeypatch.setattr(busy_sign.time, "monotonic", lambda: now + 59)
        assert reader.neighbour_is_busy()
        monkeypatch.setattr(busy_sign.time, "monotonic", lambda: now + 61)
        assert not reader.neighbour_is_busy()


def test_a_file_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--neighbour-file: .*/none/file: No such file"):
        BusySign.at(tmp_path / "none/file", Side.VISION)
    assert BusySign.at(None, Side.VISION) is None


def test_each_side_sees_the_other_and_not_itself(tmp_path: Path) -> None:
    vision, language = both_in(tmp_path)
    with vision.raised():
        assert language.neighbour_is_busy()
        assert not vision.neighbour_is_busy()
        with language.raised():
            assert vision.neighbour_is_busy()


def test_one_waits_for_its_neighbour_and_not_for_ever(tmp_path: Path) -> None:
    vision, language = both_in(tmp_path)
    vision.wait_for_neighbour(600.0)  # which does nothing
    with language.raised():
        began = time.monotonic()
        vision.wait_for_neighbour(0.05)
        assert time.monotonic() - began >= 0.05
        lowering = threading.Timer(0.05, language._count, [-1])
        lowering.start()
        vision.wait_for_neighbour(600.0)
        assert not vision.neighbour_is_busy()
        lowering.join()
        language._count(1)


def test_who_begins_has_not_yet_said_anything(tmp_path: Path) -> None:
    vision, language = both_in(tmp_path)
    with language.raised():
        BusySign(tmp_path / "neighbour", Side.LANGUAGE)
        assert not vision.neighbour_is_busy()
