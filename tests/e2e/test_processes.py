"""What happens to answers and processes when parts of the system are stopped, killed or broken."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from deploy.local import LocalStack, StackError
from internvl_client import Answer, Client, Image, OverloadedError, UnavailableError
from tests.e2e.conftest import StartStack
from tests.e2e.golden_cases import checkpoint_directory, golden_image
from tests.golden_cases import CHECKPOINTS

pytestmark = pytest.mark.e2e
STORES = ("valkey", "valkey-conversations")
LANDSCAPE, PORTRAIT = golden_image("rgb_landscape.png", 4), golden_image("rgb_portrait.png", 6)


def ask(client: Client, image: Image, question: str) -> tuple[int, ...]:
    return client.ask(image, question, max_output_tokens=24, ignore_end=True, return_token_ids=True).token_ids


def test_losing_valkey_in_the_middle_changes_no_answer(client: Client, doomed: LocalStack) -> None:
    long = {"max_output_tokens": 200, "ignore_end": True, "return_token_ids": True}
    expected = client.ask(LANDSCAPE, "Tell a story.", **long)  # type: ignore[arg-type]
    with Client(doomed.address, timeout_s=60) as bereft:
        kept = bereft.create_conversation()
        with bereft.stream(LANDSCAPE, "Tell a story.", **long) as stream:  # type: ignore[arg-type]
            next(stream)
            for name in STORES:
                doomed.processes[name].kill()
            assert stream.answer().token_ids == expected.token_ids
        for image in (LANDSCAPE, PORTRAIT, PORTRAIT):
            assert ask(bereft, image, "What now?") == ask(client, image, "What now?")
        with pytest.raises(UnavailableError) as caught:
            kept.ask("Are you there?")
        assert caught.value.reason == "STORE_UNAVAILABLE"


def test_a_frozen_valkey_changes_no_answer(client: Client, doomed: LocalStack) -> None:
    for name in STORES:
        os.kill(doomed.processes[name].pid, signal.SIGSTOP)
    with Client(doomed.address, timeout_s=60) as bereft:
        for image in (LANDSCAPE, LANDSCAPE, PORTRAIT):
            assert ask(bereft, image, "What now?") == ask(client, image, "What now?")
    for name in STORES:
        doomed.processes[name].kill()  # it would not hear that it is to stop


def test_cancelling_frees_the_sequence(doomed: LocalStack) -> None:
    """The system admits one sequence at a time, so that the next one shows when the first has gone."""
    with Client(doomed.address, timeout_s=60) as client:
        with client.stream("Tell a story.", max_output_tokens=20_000, ignore_end=True) as stream:
            next(stream)
            with pytest.raises(OverloadedError) as caught:
                client.ask("Is there room?")
            assert caught.value.reason == "QUEUE_FULL"
        assert until_admitted(client, time.monotonic() + 5).usage.num_output_tokens == 4


def until_admitted(client: Client, deadline: float) -> Answer:
    while True:
        try:
            return client.ask("Is there room?", max_output_tokens=4, ignore_end=True)
        except OverloadedError:
            assert time.monotonic() < deadline


def test_sigterm_lets_a_running_answer_end_and_every_service_exits_0(doomed: LocalStack) -> None:
    with Client(doomed.address, timeout_s=60) as client:
        with client.stream(PORTRAIT, "Tell a story.", max_output_tokens=200, ignore_end=True) as stream:
            next(stream)
            for name in ("gateway", "llm", "vision"):
                doomed.processes[name].terminate()
            assert stream.answer().usage.num_output_tokens == 200
        assert [doomed.processes[name].wait(60) for name in ("gateway", "llm", "vision")] == [0, 0, 0]
        with pytest.raises(UnavailableError):
            client.ask("Is anybody there?")


def test_a_part_that_dies_is_reported(doomed: LocalStack) -> None:
    doomed.processes["vision"].kill()
    with pytest.raises(StackError, match=rf"vision stopped \(signal {signal.SIGKILL.value}\)"):
        doomed.wait()
    doomed.stop()
    assert [process.exit_code is None for process in doomed.processes.values()] == [False] * len(doomed.processes)


def test_a_truncated_checkpoint_stops_the_start_with_the_tensor_s_name(start_stack: StartStack, tmp_path: Path) -> None:
    model = tmp_path / "cut"
    shutil.copytree(checkpoint_directory(CHECKPOINTS[0]), model)
    shard = model / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(StackError, match="stopped while starting") as caught:
        start_stack(model)
    assert "is cut short: tensor" in "\n".join(caught.value.log_lines)
