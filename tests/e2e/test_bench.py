"""Measuring a whole system: the command, and what a comparison does to the system."""

import json
from pathlib import Path

import pytest

from deploy.local import LocalStack
from internvl_client import CacheTier, Client, Image
from internvl_client.bench.pictures import draw_picture
from tests.client.command_line import run
from tests.e2e.conftest import StartStack
from tests.e2e.golden_cases import checkpoint_directory
from tests.golden_cases import CHECKPOINTS

pytestmark = pytest.mark.e2e


def test_the_command_measures_a_system(
    stack: LocalStack, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "figures.json"
    options = ("--pictures", "1", "--output-tokens", "6", "--dialogues", "2", "--rounds", "1", "--no-warmup")
    code, shown = run(capsys, monkeypatch, "bench", "--address", stack.address, *options, "--json", file)
    assert code == 0, shown
    (entry,) = json.loads(file.read_text())["workloads"]
    summary = entry["summary"]
    assert (summary["num_asked"], summary["failures"]) == (2, {})
    assert summary["output_tokens"]["least"] == summary["output_tokens"]["most"] == 6
    assert 0 < summary["ttft_s"]["least"] <= summary["total_s"]["most"]
    # Forty words and a picture: the text's length was found by asking.
    assert summary["prompt_tokens"]["median"] > 32


def test_a_restarted_llm_service_answers_where_it_did_and_pictures_are_not_encoded_again(
    start_stack: StartStack,
) -> None:
    stack = start_stack(checkpoint_directory(CHECKPOINTS[0]))
    picture = Image.from_bytes(draw_picture(64, 64, "restart"))
    pids = {name: process.pid for name, process in stack.processes.items()}
    with Client(stack.address, timeout_s=60) as client:
        before = client.ask(picture, "What is this?", max_output_tokens=4)
        stack.restart("llm")
        after = client.ask(picture, "What is this?", max_output_tokens=4)
    assert after.text == before.text
    assert after.receipts[0].cache_tier is not CacheTier.NONE
    changed = {name for name, process in stack.processes.items() if process.pid != pids[name]}
    assert changed == {"llm"}
