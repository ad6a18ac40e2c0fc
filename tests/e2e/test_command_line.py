"""The `internvl` command as people run it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image as Picture

from tests.e2e.golden_cases import checkpoint_directory
from tests.golden_cases import CHECKPOINTS, GOLDEN

pytestmark = pytest.mark.e2e
INTERNVL = Path(sys.executable).with_name("internvl")
PICTURE = GOLDEN / "images" / "rgb_landscape.png"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An account of its own, where nothing runs."""
    kept = {name: value for name, value in os.environ.items() if name != "INTERNVL_ADDRESS"}
    return kept | {"XDG_RUNTIME_DIR": str(tmp_path / "runtime"), "TMPDIR": str(tmp_path)}


def internvl(environment: dict[str, str], *arguments: str | Path, said: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [INTERNVL, *arguments], env=environment, input=said, capture_output=True, text=True, timeout=120
    )


@contextmanager
def up(environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """`internvl up`, once it says that it is ready."""
    arguments = [
        "up",
        "--model",
        checkpoint_directory(CHECKPOINTS[0]),
        "--listen",
        "127.0.0.1:0",
        "--http-listen",
        "127.0.0.1:0",
    ]
    process = subprocess.Popen([INTERNVL, *arguments], env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if b"Ctrl-C" in line:
                break
        assert process.poll() is None
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def children(process: subprocess.Popen[bytes]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def gone(pids: list[int]) -> bool:
    """Whether all of them end within a while."""
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_up_then_chat_then_ctrl_c_leaves_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    with up(environment) as system:
        assert "is ready" in internvl(environment, "status").stdout
        asked = internvl(environment, "chat", "--image", PICTURE, "What is this?", "--max-output-tokens", "8")
        assert (asked.returncode, asked.stderr) == (0, "")
        assert all(word in asked.stdout for word in ("tokens", "first token", "rgb_landscape.png", "encode"))
        talked = internvl(environment, "chat", said=f"/image {PICTURE}\nWhat?\n/image nowhere.png\nAgain?\n/quit\n")
        assert talked.stdout.count("hit in") == 2
        assert "cannot read nowhere.png" in talked.stdout
        runs = [internvl(environment, "demo").stdout for _ in range(2)]
        # Fifteen pictures are read in ten turns; ten of them differ.
        assert [run.count("no encode") for run in runs] == [5, 15]
        # A dialogue's pictures are encoded for its first question and for no other.
        for turns in (dialogue.split("\n> ")[1:] for dialogue in runs[0].split("\n\n[")[1:]):
            assert [("cached from now on" in turn, "no encode" in turn) for turn in turns] == [
                (True, False),
                *[(False, True)] * (len(turns) - 1),
            ]
        parts = children(system)
        assert len(parts) == 5
        system.send_signal(signal.SIGINT)
        assert system.wait(30) == 0
        assert gone(parts)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_running_system_is_examined_watched_and_asked_in_batches(environment: dict[str, str], tmp_path: Path) -> None:
    with up(environment):
        doctor = internvl(environment, "doctor", "--json")
        levels = {finding["subject"]: finding["level"] for finding in json.loads(doctor.stdout)}
        assert doctor.returncode == 0, doctor.stdout + doctor.stderr
        assert {"gateway", "vision", "llm", "models", "conversations", "llm: embeddings", "clocks"} <= levels.keys()
        assert (levels["vision"], levels["llm"], levels["models"], levels["versions"]) == ("ok",) * 4

        drawn = tmp_path / "tiles.png"
        tiles = internvl(environment, "tiles", PICTURE, "--output", drawn)
        assert (tiles.returncode, tiles.stderr) == (0, "")
        assert Picture.open(drawn).format == "PNG"

        questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
        lines = [{"id": f"q{number}", "image": str(PICTURE), "question": f"{number}?"} for number in range(3)]
        questions.write_text("".join(f"{json.dumps(line)}\n" for line in [*lines, {"id": "lost", "image": "no.png"}]))
        first = internvl(environment, "batch", questions, answers, "--max-output-tokens", "4")
        assert first.returncode == 1
        assert "3 answered, 1 failed" in first.stdout
        second = internvl(environment, "batch", questions, answers, "--retry-failed")
        assert "0 answered, 1 failed, 3 had a result before" in second.stdout
        results = [json.loads(line) for line in answers.read_text().splitlines()]
        assert sorted(result["id"] for result in results) == ["lost", "lost", "q0", "q1", "q2"]
        assert all(result["usage"]["visual_tokens"] for result in results if "usage" in result)

        top = internvl(environment, "top")
        assert (top.returncode, top.stderr) == (0, "")
        assert "3 (100%)" in top.stdout


def test_demo_starts_what_it_needs_and_shows_a_hit_on_the_second_turn(
    environment: dict[str, str], tmp_path: Path
) -> None:
    demo = internvl(environment, "demo", "--image", PICTURE)
    assert (demo.returncode, demo.stderr) == (0, "")
    first, second = demo.stdout.split("> Which colours do you see?")
    assert "cached from now on" in first
    assert "no encode" in second
    assert all("first token" in turn and "visual tokens" in turn for turn in (first, second))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def test_parts_die_with_a_killed_starter(environment: dict[str, str]) -> None:
    with up(environment) as system:
        parts = children(system)
        system.kill()
        system.wait()
        assert gone(parts)
    assert "nothing runs here" in internvl(environment, "chat", "Hello").stderr


def test_what_cannot_work_is_one_line_and_an_exit_code(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases = [
        (("chat", "Hello"), 1, "internvl up"),
        (("chat", "Hello", "--address", "127.0.0.1:1"), 1, "No gateway answers at 127.0.0.1:1"),
        (("status", "--address", "127.0.0.1:1"), 1, "No gateway answers"),
        (("chat", "--image", tmp_path / "nowhere.png", "Hello"), 2, "does not exist"),
        (("chat", "Hello", "--max-output-tokens", "0"), 2, "max-output-tokens"),
        (("up", "--model", tmp_path / "nowhere"), 2, "does not exist"),
        (("up", "--model", tmp_path / "empty", "--listen", "127.0.0.1:0"), 1, "stopped while starting"),
    ]
    for arguments, code, said in cases:
        ended = internvl(environment, *arguments)
        assert (ended.returncode, said in ended.stderr) == (code, True), ended
        assert "Traceback" not in ended.stderr + ended.stdout
