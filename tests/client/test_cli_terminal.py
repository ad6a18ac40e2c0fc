"""`internvl chat` in a terminal of its own, as somebody uses it."""

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image as Picture

from tests.client.fake_gateway import FakeGateway, answer_of, endless

INTERNVL = Path(sys.executable).with_name("internvl")
# Makes the terminal on its standard input its own, so that Ctrl-C there is a signal, and becomes the command.
_BECOME = (
    "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """A pseudo terminal with a command in it."""

    def __init__(self, *command: str | Path, **environment: str) -> None:
        self._ours, theirs = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BECOME, *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor"} | environment,
        )
        os.close(theirs)
        self._seen = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def until(self, text: str) -> str:
        """Return what has been shown since the last call, up to and with `text`."""
        deadline = time.monotonic() + 60
        while text not in self._seen:
            assert select.select([self._ours], [], [], deadline - time.monotonic())[0], self._seen
            self._seen += os.read(self._ours, 65536).decode(errors="replace")
        shown, _, self._seen = self._seen.partition(text)
        return shown + text

    def leave(self) -> int:
        """Press Ctrl-D, as somebody does until it is noticed: before the line is read it means nothing yet."""
        deadline = time.monotonic() + 60
        while self.process.poll() is None:
            assert time.monotonic() < deadline
            self.type("\x04")
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal(gateway: FakeGateway, tmp_path: Path) -> Iterator[Terminal]:
    environment = {name: "" for name in ("NO_COLOR",) if name in os.environ}
    terminal = Terminal(
        INTERNVL, "chat", "--address", gateway.address, XDG_RUNTIME_DIR=str(tmp_path), LANG="C.UTF-8", **environment
    )
    yield terminal
    terminal.close()


def test_pictures_are_seen_answers_can_be_stopped_and_the_chat_goes_on(
    gateway: FakeGateway, terminal: Terminal, tmp_path: Path
) -> None:
    path = tmp_path / "a cat.png"
    Picture.new("RGB", (64, 64), "red").save(path)
    terminal.until("> ")
    terminal.type(f"'{path}'\n")
    assert "\u2580" in terminal.until("a cat.png, ")
    terminal.until("> ")

    gateway.answer = lambda request, context: endless(gateway, context)
    terminal.type("What is it?\n")
    terminal.until("more more ")
    terminal.type("\x03")
    terminal.until("(stopped)")
    assert gateway.cancelled.wait(20)
    terminal.until("> ")

    gateway.answer = lambda request, context: answer_of("It ", "is a cat.")
    terminal.type("And now?\n")
    terminal.until("It is a cat.")
    terminal.until("first token")
    terminal.until("> ")
    assert terminal.leave() == 0
    # The picture of the question that was stopped goes with the next one.
    assert [len(request.messages[0].parts) for request in gateway.chats] == [2, 2]
