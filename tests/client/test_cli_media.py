"""`internvl prefetch` and `internvl estimate` against a scripted gateway."""

import hashlib
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from internvl_client import cli_media
from tests.client.command_line import run
from tests.client.fake_gateway import FakeGateway

pytestmark = pytest.mark.usefixtures("own_account")


class Shell:
    """Runs the command; its words and the address come last."""

    def __init__(self, address: str, *tools: Any) -> None:
        self._address, self._tools = address, tools

    def run(self, *arguments: str | Path) -> tuple[Any, ...]:
        return run(*self._tools, *arguments, "--address", self._address)


@pytest.fixture
def shell(gateway: FakeGateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(gateway.address, capsys, monkeypatch)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("cat.jpg", "dog.jpg", "clip.MP4")]
    for path in paths:
        path.write_bytes(path.name.encode())
    return paths


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_prefetch_says_what_is_ready(gateway: FakeGateway, shell: Shell, files: list[Path]) -> None:
    gateway.media[digest_of(files[1])] = files[1].read_bytes()
    code, out = shell.run("prefetch", *files, "--max-tiles", "6")
    assert (code, out) == (0, "3 ready (2 encoded, 1 in caches already), 9984 visual tokens.\n")
    (request,) = gateway.prefetches
    assert [medium.inline for medium in request.media] == [b"cat.jpg", b"dog.jpg", b"clip.MP4"]
    assert [medium.options.max_tiles for medium in request.media] == [6, 6, 6]
    assert [medium.options.HasField("video") for medium in request.media] == [False, False, True]


def test_each_file_that_fails_has_a_line(gateway: FakeGateway, shell: Shell, files: list[Path]) -> None:
    gateway.refused = {digest_of(path): "MEDIA_UNREADABLE" for path in files[:2]}
    code, out = shell.run("prefetch", *files)
    assert code == "internvl: 2 of 3 failed."
    first, second, last = out.splitlines()
    assert first.startswith(f"{files[0]}: Ours. [MEDIA_UNREADABLE, request id ")
    assert second.startswith(f"{files[1]}: Ours. [MEDIA_UNREADABLE, request id ")
    assert last == "1 ready (1 encoded, 0 in caches already), 3328 visual tokens."


def test_only_so_many_files_are_in_memory(
    gateway: FakeGateway, shell: Shell, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_media, "_GROUP_BYTES", 10)
    code, out = shell.run("prefetch", *files)
    assert (code, out.partition(" ")[0]) == (0, "3")
    assert [len(request.media) for request in gateway.prefetches] == [2, 1]


def test_a_file_that_cannot_be_read_fails_alone(
    gateway: FakeGateway, shell: Shell, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_bytes = Path.read_bytes

    def read(path: Path) -> bytes:
        if path == files[0]:
            raise OSError(5, "Input/output error")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    for command in ("prefetch", "estimate"):
        code, out = shell.run(command, *files)
        assert code == "internvl: 1 of 3 failed."
        assert f"{files[0]}: cannot be read: Input/output error." in out.splitlines()
    assert len(gateway.prefetches[0].media) == len(gateway.estimates) == 2


def test_a_terminal_shows_how_far_it_is() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with cli_media._progress_bar(console, 20) as show_progress:
        show_progress(10, 5, 10)
    assert isinstance(console.file, io.StringIO)
    assert "15/20" in console.file.getvalue()


def test_estimate_is_a_table(gateway: FakeGateway, shell: Shell, files: list[Path]) -> None:
    code, out = shell.run("estimate", *files[:2], "--max-tiles", "6")
    assert code == 0
    head, *rows = [line.split() for line in out.splitlines()]
    assert head == ["file", "size", "grid", "tiles", "tokens"]
    assert rows == [[str(path), "640x480", "4x3", "13", "3328"] for path in files[:2]]
    assert len({len(line) for line in out.splitlines()}) == 1
    assert {request.media.options.max_tiles for request in gateway.estimates} == {6}


def test_a_file_that_is_no_picture_has_a_line_among_the_rows(
    gateway: FakeGateway, shell: Shell, files: list[Path]
) -> None:
    gateway.header_bytes = 8
    code, out = shell.run("estimate", *files)
    assert code == "internvl: 2 of 3 failed."
    lines = out.splitlines()
    assert [line.partition(":")[0] for line in lines[1:3]] == [str(path) for path in files[:2]]
    assert lines[3].split()[1:] == ["640x480", "4x3", "13", "3328"]


@pytest.mark.parametrize("command", ["prefetch", "estimate"])
def test_without_a_gateway_nothing_is_tried(
    command: str, files: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out = run(capsys, monkeypatch, command, *files, "--address", "127.0.0.1:1")
    assert code.startswith("internvl: No gateway answers at 127.0.0.1:1.")
    assert str(files[0]) not in out
