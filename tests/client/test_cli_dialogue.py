"""A dialogue that somebody types, against a scripted gateway."""

import io
import itertools
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from PIL import Image as Picture
from rich.console import Console

from internvl_client import Client, GenerationConfig
from internvl_client.cli_dialogue import TypedDialogue, completions
from internvl_client.cli_session import ChatSession
from internvl_client.media_paths import split_pasted
from internvl_serving.gateway.v1 import chat_service_pb2
from tests.client.fake_gateway import FakeGateway, answer_of, refuse


class Terminal:
    """Somebody at a terminal: types lines, one of which may be a signal, and sees what is printed."""

    def __init__(self, client: Client, monkeypatch: pytest.MonkeyPatch, width: int = 200, **session: Any) -> None:
        self._client, self._monkeypatch = client, monkeypatch
        self.console = Console(
            file=io.StringIO(), force_terminal=True, color_system="truecolor", width=width, highlight=False
        )
        config = session.pop("config", GenerationConfig())
        self.session = ChatSession(self.console, config, brief=True, **session)

    def type(self, *lines: str | type[BaseException]) -> str:
        """Run a dialogue of these lines, with Ctrl-D behind the last; return what was printed, without colours."""
        typed = iter(lines)

        def read() -> str:
            line = next(typed, EOFError)
            if isinstance(line, str):
                return line
            raise line

        self._monkeypatch.setattr("builtins.input", read)
        TypedDialogue(self.session, self._client.create_conversation).run()
        return self.printed

    @property
    def printed(self) -> str:
        assert isinstance(self.console.file, io.StringIO)
        return self.console.file.getvalue()


@pytest.fixture
def terminal(client: Client, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    return Terminal(client, monkeypatch)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a cat's.png"
    Picture.new("RGB", (100, 50), "red").save(path)
    return path


def texts(gateway: FakeGateway) -> list[str]:
    return [request.messages[-1].parts[-1].text for request in gateway.chats]


def kept_answer(message_id: str) -> Iterator[chat_service_pb2.ChatResponse]:
    for response in answer_of("Here."):
        if response.HasField("finished"):
            response.finished.message_id = message_id
        yield response


def num_media(gateway: FakeGateway) -> list[int]:
    return [len(request.messages[-1].parts) - 1 for request in gateway.chats]


def test_a_path_that_is_dragged_in_goes_with_the_next_question_and_is_shown(
    gateway: FakeGateway, terminal: Terminal, picture: Path
) -> None:
    printed = terminal.type(shlex.quote(str(picture)), "What is it?", "And now?")
    assert (texts(gateway), num_media(gateway)) == (["What is it?", "And now?"], [1, 0])
    assert "\u2580" in printed
    assert "a cat's.png, " in printed


def test_a_path_among_words_is_taken_out_of_the_question(
    gateway: FakeGateway, terminal: Terminal, picture: Path
) -> None:
    terminal.type(f"What is {shlex.quote(str(picture))} about?")
    assert (texts(gateway), num_media(gateway)) == (["What is about?"], [1])


def test_an_answer_ends_with_one_line_of_what_it_cost(terminal: Terminal) -> None:
    printed = terminal.type("What?")
    (line,) = [line for line in printed.splitlines() if "first token" in line]
    assert "4.0 tokens/s | 9 read, 0 cached, 3 written | aaaaaaaaaaaa: encode 0 ms, cached from now on" in line


def test_a_new_dialogue_forgets_the_old_one(gateway: FakeGateway, terminal: Terminal, picture: Path) -> None:
    terminal.type("One", f"/image {shlex.quote(str(picture))}", "/reset", "Two")
    assert [request.conversation_id for request in gateway.chats] == ["c0", "c1"]
    assert num_media(gateway) == [0, 0]
    assert list(gateway.conversations) == ["c1"]


def test_the_first_question_is_asked_again_in_a_new_conversation_with_sampling(
    gateway: FakeGateway, terminal: Terminal, picture: Path
) -> None:
    printed = terminal.type(f"{shlex.quote(str(picture))} What?", "/retry", "/retry 1.5")
    assert (texts(gateway), num_media(gateway)) == (["What?"] * 3, [1] * 3)
    assert [request.generation_config.temperature for request in gateway.chats] == [0, pytest.approx(0.7), 1.5]
    assert list(gateway.conversations) == ["c2"]
    assert "at temperature 0.7" in printed


def test_a_later_question_is_asked_again_behind_what_was_said_before_it(
    gateway: FakeGateway, terminal: Terminal
) -> None:
    numbers = itertools.count(1)
    gateway.answer = lambda request, context: kept_answer(f"m{next(numbers)}")
    terminal.type("One", "Two", "/retry")
    assert texts(gateway) == ["One", "Two", "Two"]
    (fork,) = gateway.forks
    assert (fork.conversation_id, fork.message_id) == ("c0", "m1")
    assert gateway.chats[-1].conversation_id in gateway.conversations
    assert "c0" not in gateway.conversations


def test_what_was_not_kept_cannot_be_gone_back_to(gateway: FakeGateway, terminal: Terminal) -> None:
    assert "cannot be taken back" in terminal.type("One", "Two", "/retry")
    assert texts(gateway) == ["One", "Two"]


def test_a_question_that_failed_is_asked_again_where_it_was(gateway: FakeGateway, terminal: Terminal) -> None:
    answers = iter([grpc.StatusCode.RESOURCE_EXHAUSTED, None])

    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[chat_service_pb2.ChatResponse]:
        if code := next(answers):
            refuse(context, code, "QUEUE_FULL")
        yield from answer_of("Here.")

    gateway.answer = answer
    printed = terminal.type("What?", "/retry")
    assert "QUEUE_FULL" in printed
    assert "Here." in printed
    assert [request.conversation_id for request in gateway.chats] == ["c0", "c0"]
    assert {request.generation_config.temperature for request in gateway.chats} == {0}


def test_ctrl_c_stops_an_answer_and_keeps_the_chat(gateway: FakeGateway, terminal: Terminal) -> None:
    ask = terminal.session.ask

    def stopped_once(*arguments: Any, **more: Any) -> Any:
        terminal.session.ask = ask  # type: ignore[method-assign]
        raise KeyboardInterrupt

    terminal.session.ask = stopped_once  # type: ignore[method-assign]
    printed = terminal.type("One", "Two")
    assert "(stopped)" in printed
    assert texts(gateway) == ["Two"]


def test_ctrl_c_at_the_prompt_drops_what_was_typed(gateway: FakeGateway, terminal: Terminal) -> None:
    printed = terminal.type(KeyboardInterrupt, "One")
    assert "(Ctrl-D leaves)" in printed
    assert texts(gateway) == ["One"]


def test_a_dialogue_is_written_as_markdown_or_json(terminal: Terminal, picture: Path, tmp_path: Path) -> None:
    markdown, as_json = tmp_path / "talk.md", tmp_path / "talk.json"
    printed = terminal.type(
        f"{shlex.quote(str(picture))} What?", "And?", f"/save {markdown}", f"/save {as_json}", f"/save {tmp_path}"
    )
    assert "2 turns are in" in printed
    assert "cannot write" in printed
    assert markdown.read_text().startswith("**You:** [a cat's.png] What?\n\n**tiny:** It is a cat.\n")
    first, second = json.loads(as_json.read_text())
    assert (first["question"], first["answer"], first["media"][0]["name"]) == ("What?", "It is a cat.", "a cat's.png")
    assert second["media"] == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/help", "/retry [TEMPERATURE]"),
        ("/nothing", "there is no command /nothing"),
        ("/retry", "nothing has been asked yet"),
        ("/retry hot", "a temperature is"),
        ("/save", "name a file"),
        ("/image nowhere.png", "cannot read nowhere.png"),
    ],
)
def test_commands_say_what_is_wrong_and_ask_nothing(
    gateway: FakeGateway, terminal: Terminal, line: str, said: str
) -> None:
    assert said in terminal.type(line)
    assert not gateway.chats


def test_boxes_are_listed_in_pixels(gateway: FakeGateway, terminal: Terminal, picture: Path) -> None:
    gateway.answer = lambda request, context: answer_of("<ref>cat</ref><box>[[100, 200, 500, 1000]]</box>")
    assert "(10, 10) to (50, 50) px cat" in terminal.type(f"{shlex.quote(str(picture))} Where?")


def test_a_picture_that_pillow_cannot_read_is_a_line_of_text(
    gateway: FakeGateway, terminal: Terminal, picture: Path
) -> None:
    picture.write_bytes(b"no picture")
    printed = terminal.type(f"{shlex.quote(str(picture))} What?")
    assert "a cat's.png, 0.0 kB" in printed
    assert "\u2580" not in printed
    assert num_media(gateway) == [1]


def test_lines_from_a_pipe_are_taken_as_they_are(
    gateway: FakeGateway, client: Client, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter([f"What is {picture}?"])
    monkeypatch.setattr("builtins.input", lambda: next(lines, None) or (_ for _ in ()).throw(EOFError))
    session = ChatSession(Console(file=io.StringIO()), GenerationConfig())
    TypedDialogue(session, client.create_conversation).run()
    assert (texts(gateway), num_media(gateway)) == ([f"What is {picture}?"], [0])


@pytest.mark.parametrize(
    "pasted",
    [
        "{0}",
        "'{1}'",
        '"{0}"',
        "{2}",
        "file://{3}",
        " {2} ",
    ],
)
def test_paths_are_understood_as_terminals_paste_them(picture: Path, pasted: str) -> None:
    plain = str(picture)
    forms = (
        plain,
        plain.replace("'", "'\\''"),
        plain.replace(" ", "\\ ").replace("'", "\\'"),
        plain.replace(" ", "%20"),
    )
    assert split_pasted(pasted.format(*forms)) == ([picture], "")


def test_what_only_looks_like_a_path_stays_text(picture: Path, tmp_path: Path) -> None:
    secret = tmp_path / "passwords.txt"
    secret.touch()
    for line in ("what's this?", "it's 5 o'clock", f"read {secret}", "see nowhere.png", "~nobody/cat.png", "x" * 5000):
        assert split_pasted(line) == ([], line)


def test_several_paths_keep_their_order(tmp_path: Path) -> None:
    first, second = tmp_path / "a.png", tmp_path / "b.MP4"
    for path in (first, second):
        path.touch()
    assert split_pasted(f"{second} {first} compare  these") == ([second, first], "compare these")


def test_tab_completes_commands_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.png").touch()
    monkeypatch.chdir(tmp_path)
    commands = ("/image", "/quit")
    assert completions("/im", "/im", commands) == ["/image "]
    assert completions("/image pic", "pic", commands) == ["pictures/"]
    assert completions("/image pictures/c", "pictures/c", commands) == ["pictures/cat.png"]
    assert completions(f"{tmp_path}/p", f"{tmp_path}/p", commands) == [f"{tmp_path}/pictures/"]
    assert completions("x", f"{tmp_path}{os.sep}nowhere/x", commands) == []
