"""The `internvl` command against a scripted gateway."""

import os
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from PIL import Image

from internvl_client.running import RunningSystem, announce, find_running, withdraw
from tests.client.command_line import run
from tests.client.fake_gateway import FakeGateway, answer_of, candidates_of, refuse

pytestmark = pytest.mark.usefixtures("own_account")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"not looked at here")
    return path


def test_chat_prints_the_answer_and_what_it_cost(
    gateway: FakeGateway, picture: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out = run(capsys, monkeypatch, "chat", "-i", picture, "What?", "--address", gateway.address)
    assert code == 0
    assert out.startswith("It is a cat.\n")
    assert "9 read (4 visual, 0 cached), 3 written, ended by STOP" in out
    assert "4.0 tokens/s" in out
    assert "encode 0 ms, cached from now on" in out
    request = gateway.chats[0]
    assert [part.WhichOneof("content") for part in request.messages[0].parts] == ["media", "text"]


def test_the_address_comes_from_the_environment_or_the_note(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _ = run(capsys, monkeypatch, "chat", "What?")
    assert "internvl up" in code
    announce(RunningSystem(gateway.address, "model", os.getpid()))
    assert run(capsys, monkeypatch, "chat", "What?")[0] == 0
    monkeypatch.setenv("INTERNVL_ADDRESS", "127.0.0.1:1")
    assert "127.0.0.1:1" in run(capsys, monkeypatch, "chat", "What?")[0]


def test_an_error_is_one_line_with_its_reason(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.answer = lambda request, context: refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "EMPTY_MESSAGE")  # type: ignore[assignment,return-value]
    code, _ = run(capsys, monkeypatch, "chat", "", "--address", gateway.address)
    assert code.startswith("internvl: Ours. [EMPTY_MESSAGE, request id ")


def test_escape_sequences_of_a_model_do_not_reach_the_terminal(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.answer = lambda request, context: answer_of("\x1b[2J\x07[bold]Hi[/bold]\n\ttab")
    _, out = run(capsys, monkeypatch, "chat", "What?", "--address", gateway.address)
    assert out.startswith("\ufffd[2J\ufffd[bold]Hi[/bold]\n\ttab\n")


def test_a_video_goes_with_its_options(
    gateway: FakeGateway, picture: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--segments", "4", "--from", "0.5", "--to", "2", "--max-tiles", "3"]
    code, _ = run(capsys, monkeypatch, "chat", "--video", picture, *options, "What?", "--address", gateway.address)
    assert code == 0
    sent = gateway.chats[0].messages[0].parts[0].media.options
    assert (sent.max_tiles, sent.video.segment_count) == (3, 4)
    assert (sent.video.start_seconds, sent.video.end_seconds) == (0.5, 2.0)


def test_detail_schema_and_grounding_reach_the_gateway(
    gateway: FakeGateway, picture: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = picture.with_name("schema.json")
    schema.write_text('{"type": "object"}')
    options = ["--detail", "low", "--json-schema", schema, "--grounding", "--address", gateway.address]
    assert run(capsys, monkeypatch, "chat", "-i", picture, "What?", *options)[0] == 0
    request = gateway.chats[0]
    assert request.messages[0].parts[0].media.options.max_tiles == 6
    assert (request.generation_config.json_schema, request.generation_config.grounding) == ('{"type": "object"}', True)
    code, _ = run(capsys, monkeypatch, "chat", "-i", picture, "What?", *options, "--max-tiles", "3")
    assert "not both" in code
    schema.write_bytes(b"\xff")
    assert "cannot read" in run(capsys, monkeypatch, "chat", "-i", picture, "What?", *options)[0]


def test_candidates_are_shown_one_after_another_the_best_first(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.answer = lambda request, context: candidates_of("first", "second", "third", best=1)
    _, out = run(capsys, monkeypatch, "chat", "What?", "--candidates", "3", "--address", gateway.address)
    shown = [line for line in out.splitlines() if not line.startswith("  ")]
    assert shown == [
        "[best, score 1.000, steps 0.25 0.50]",
        "second",
        "[score 0.750, steps 0.25 0.50]",
        "first",
        "[score 0.750, steps 0.25 0.50]",
        "third",
    ]
    assert gateway.chats[0].generation_config.candidate_count == 3


def test_boxes_are_drawn_on_the_picture(
    gateway: FakeGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, target = tmp_path / "white.png", tmp_path / "boxes.png"
    Image.new("RGB", (100, 100), "white").save(picture)
    gateway.answer = lambda request, context: answer_of("<ref>cat</ref><box>[[500, 500, 900, 900]]</box>")
    arguments = ["chat", "-i", picture, "Where?", "--save-boxes", target, "--address", gateway.address]
    _, out = run(capsys, monkeypatch, *arguments)
    assert f"1 drawn on white.png, {target}" in out
    assert gateway.chats[0].generation_config.grounding
    drawn = Image.open(target).convert("RGB")
    assert drawn.getpixel((90, 70)) != (255, 255, 255)
    gateway.answer = lambda request, context: answer_of("Nowhere.")
    assert "none to draw" in run(capsys, monkeypatch, *arguments)[1]
    picture.write_bytes(b"no picture")
    assert "no picture" in run(capsys, monkeypatch, *arguments)[0]
    code, _ = run(capsys, monkeypatch, "chat", "Where?", "--save-boxes", target, "--address", gateway.address)
    assert "no picture to draw" in code


def test_boxes_are_drawn_on_the_picture_as_the_server_sees_it(
    gateway: FakeGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, target = tmp_path / "turned.png", tmp_path / "boxes.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 60), "white").save(picture, exif=exif)
    gateway.answer = lambda request, context: answer_of("<ref>cat</ref><box>[[500, 500, 900, 900]]</box>")
    arguments = ["chat", "-i", picture, "Where?", "--save-boxes", target, "--address", gateway.address]
    for policy, size in (([], (100, 60)), (["--image-policy", "viewer"], (60, 100))):
        assert run(capsys, monkeypatch, *arguments, *policy)[0] == 0
        drawn = Image.open(target).convert("RGB")
        assert drawn.size == size
        assert drawn.getpixel((round(size[0] * 0.9), round(size[1] * 0.7))) != (255, 255, 255)


def test_a_conversation_is_typed_line_by_line(
    gateway: FakeGateway, picture: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = [f"/image '{picture}'", f"/video '{picture}'", "What?", "", "/image nowhere.png", "And now?", "/quit", "No"]
    lines = iter(typed)
    monkeypatch.setattr("builtins.input", lambda: next(lines))
    code, out = run(capsys, monkeypatch, "chat", "--address", gateway.address, "--system", "Be brief.")
    assert code == 0
    assert out.count("It is a cat.") == 2
    assert "cannot read nowhere.png: No such file or directory." in out
    assert [len(request.messages[0].parts) for request in gateway.chats] == [3, 1]
    assert gateway.chats[0].messages[0].parts[1].media.options.HasField("video")
    assert {request.conversation_id for request in gateway.chats} == {"c0"}
    assert gateway.conversations["c0"].system_message == "Be brief."


def test_a_note_of_a_process_that_has_gone_counts_for_nothing() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    announce(RunningSystem("127.0.0.1:1", "model", ended.pid))
    assert find_running() is None


def test_a_note_is_withdrawn_only_by_its_own_system() -> None:
    first, second = (RunningSystem(f"127.0.0.1:{port}", "model", os.getpid()) for port in (1, 2))
    announce(first)
    announce(second)
    withdraw(first)
    assert find_running() == second
    withdraw(second)
    assert find_running() is None


def test_the_library_imports_nothing_that_only_the_command_needs() -> None:
    program = "import sys, internvl_client; print({'typer', 'rich', 'deploy', 'shared', 'redis'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout == "set()\n"


def test_the_command_without_its_libraries_says_what_to_install() -> None:
    program = "import sys; sys.modules['typer'] = None; from internvl_client.cli import main; main()"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr == (
        "internvl: the command needs typer, which is not installed: pip install 'internvl-serving[local]'\n"
    )
