"""The protos are clean, and the checked-in stubs are theirs."""

import filecmp
import subprocess
import sys
from pathlib import Path

PROTOS = Path(__file__).parents[1] / "protos"


def files_below(folder: Path) -> set[Path]:
    return {
        path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }


def test_stubs_are_fresh(tmp_path: Path) -> None:
    subprocess.run([sys.executable, PROTOS / "generate.py", "--output", tmp_path], check=True, capture_output=True)
    checked_in = PROTOS / "gen"
    names = files_below(tmp_path)
    assert names == files_below(checked_in)
    _, different, missing = filecmp.cmpfiles(tmp_path, checked_in, map(str, names), shallow=False)
    assert not different + missing, "run python protos/generate.py and commit what changes"


def test_protos_are_clean_by_buf() -> None:
    buf = Path(sys.executable).with_name("buf")
    lint = subprocess.run([buf, "lint"], cwd=PROTOS, capture_output=True, text=True, check=False)
    assert lint.returncode == 0, lint.stdout
