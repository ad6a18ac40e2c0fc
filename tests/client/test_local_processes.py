"""Child processes and the local Valkey: started, stopped, and gone with whoever started them."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar
from urllib.request import urlopen

import pytest
from redis import Redis

from deploy.local import LocalStack, StackError, StackOptions
from deploy.local.process import ChildProcess
from deploy.local.service import Service
from deploy.local.stack import Report, device_flags, http_flags
from deploy.local.valkey import CONVERSATIONS, LocalValkey
from llm_service.settings import LlmSettings
from tests.client.command_line import run
from vision_service.settings import VisionSettings

PYTHON = sys.executable
STUBBORN = "from signal import *; import time; signal(SIGTERM, SIG_IGN); print('deaf', flush=True); time.sleep(60)"
SPAWN = (
    "import subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
)


def child(tmp_path: Path, program: str, said: str = "") -> ChildProcess:
    return ChildProcess("child", [PYTHON, "-c", program], {"COLOUR": "green"}, tmp_path / "child.log", said)


def until(condition: Callable[[], object]) -> bool:
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_the_vision_tower_and_the_language_model_share_the_first_device() -> None:
    shared = "--vit-shares-first-device"
    for device, first in (("auto", "auto"), ("cpu", "cpu"), ("cuda:1", "cuda:1"), ("cuda:0,cuda:1", "cuda:0")):
        vision, llm = (device_flags(stage, device) for stage in ("vision", "llm"))
        assert (vision, llm) == (["--device", first, "--cpu-nice", "10"], ["--device", device, shared])
        # The services themselves understand it.
        common = ["--model", ".", "--listen", "127.0.0.1:0"]
        assert VisionSettings.from_command_line("vision", [*common, *vision]).devices == first
        read = LlmSettings.from_command_line("llm", [*common, *llm])
        assert (read.devices, read.vit_shares_first_device) == (device, True)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_child_gets_its_environment_and_input_and_leaves_a_log(tmp_path: Path) -> None:
    process = child(tmp_path, "import os; print(os.environ['COLOUR'], input()); raise SystemExit(3)", said="light\n")
    assert process.wait(20) == 3
    assert process.last_lines() == ["green light"]


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    process = child(tmp_path, STUBBORN)
    assert until(process.last_lines)
    assert process.memory_bytes > 1 << 20
    process.stop(grace_s=0.1)
    assert process.exit_code == -signal.SIGKILL


def test_stopping_a_child_ends_what_it_has_started(tmp_path: Path) -> None:
    process = child(tmp_path, f"{SPAWN}; sys.stdout.flush(); time.sleep(60)")
    assert until(process.last_lines)
    grandchild = int(process.last_lines()[0])
    process.stop(grace_s=5)
    assert until(lambda: not is_running(grandchild))


def test_a_child_dies_with_a_starter_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from deploy.local.process import ChildProcess\n"
        "print(ChildProcess('c', [sys.executable, '-c', 'import time; time.sleep(60)'], {}, Path(sys.argv[1])).pid)\n"
        "sys.stdout.flush(); time.sleep(60)"
    )
    with subprocess.Popen([PYTHON, "-c", program, tmp_path / "log"], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        assert is_running(pid)
        starter.kill()
    assert until(lambda: not is_running(pid))


def test_conversations_are_in_a_valkey_that_forgets_nothing(tmp_path: Path) -> None:
    valkey = LocalValkey(tmp_path, CONVERSATIONS)
    try:
        with Redis.from_url(valkey.url(0)) as redis:
            assert redis.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    finally:
        valkey.process.stop(5)


def test_valkey_keeps_its_password_and_nothing_on_disk(tmp_path: Path) -> None:
    valkey = LocalValkey(tmp_path)
    try:
        with Redis.from_url(valkey.url(1)) as redis:
            redis.set("key", "value")
            assert redis.get("key") == b"value"
            assert redis.config_get("maxmemory-policy") == {"maxmemory-policy": "volatile-lru"}
        with Redis(port=valkey.port) as stranger, pytest.raises(Exception, match="authenticated"):
            stranger.get("key")
        command_line = Path(f"/proc/{valkey.process.pid}/cmdline").read_text()
        assert valkey.url(0).split("@")[0].rpartition(":")[2] not in command_line
    finally:
        valkey.process.stop(5)
    assert [path.name for path in tmp_path.iterdir()] == ["valkey.log"]


@contextmanager
def gateways(tmp_path: Path, listen: str, count: int, *, port_fallback: bool) -> Iterator[list[tuple[Service, Path]]]:
    """Gateways without stages, which begin together, and the files that get where they answer HTTP."""
    options = StackOptions(tmp_path, http_listen=listen, http_port_fallback=port_fallback)
    stages = ["--vision-target", "127.0.0.1:1", "--llm-target", "127.0.0.1:1", "--listen", "127.0.0.1:0"]
    made = []
    try:
        for index in range(count):
            file = tmp_path / f"{index}-http.address"
            flags = [*stages, *http_flags(options, file)]
            made.append((Service(f"gateway-{index}", "gateway", flags, {}, tmp_path), file))
        yield made
    finally:
        for service, _ in made:
            service.process.kill()


def answers_http(address: str) -> bool:
    with urlopen(f"http://{address}/health/live", timeout=20) as answer:
        return bool(answer.status == 200)


def test_systems_that_begin_together_share_no_http_port_and_all_run(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as found:
        listen = f"127.0.0.1:{found.getsockname()[1]}"
    with gateways(tmp_path, listen, 2, port_fallback=True) as made:
        assert until(lambda: all(service.address for service, _ in made))  # said after HTTP has begun
        addresses = [file.read_text() for _, file in made]
        assert len(set(addresses)) == 2
        assert listen in addresses
        assert all(map(answers_http, addresses))


def test_an_http_port_that_was_asked_for_and_is_taken_ends_the_gateway(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with gateways(tmp_path, listen, 1, port_fallback=False) as [(service, _)]:
            assert service.process.wait(20) == 1
            assert f"cannot listen on {listen}" in service.process.last_lines()[-1]
            assert service.process.last_lines()[-1].endswith("choose another --http-listen.")


class UnstartedStack(LocalStack):
    """Starts nothing, and says what it was to start."""

    asked: ClassVar[list[StackOptions]] = []

    def start(self, report: Report = lambda states: None) -> None:
        self.asked.append(self._options)
        raise StackError("enough")


@pytest.mark.parametrize(
    ("given", "listen", "port_fallback"),
    [
        ([], "127.0.0.1:8000", True),
        (["--http-listen", "127.0.0.1:8000"], "127.0.0.1:8000", False),
        (["--http-listen", ""], "", False),
    ],
)
def test_only_the_usual_http_port_is_a_mere_preference(
    given: list[str],
    listen: str,
    port_fallback: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deploy.local.commands.LocalStack", UnstartedStack)
    code, _ = run(capsys, monkeypatch, "up", "--model", tmp_path, "--logs", tmp_path, *given)
    assert "enough" in code
    options = UnstartedStack.asked.pop()
    assert (options.http_listen, options.http_port_fallback) == (listen, port_fallback)


def test_a_stack_that_cannot_start_stops_what_it_has_started(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    stack = LocalStack(StackOptions(tmp_path / "model", logs=tmp_path / "logs"))
    with pytest.raises(StackError, match="stopped while starting") as caught:
        stack.start()
    assert "config.json is missing" in "\n".join(caught.value.log_lines)
    assert all(process.exit_code is not None for process in stack.processes.values())
    assert not list((tmp_path / "logs").glob("*.address"))
