"""A dialogue that is typed at a terminal: lines that are questions, files or commands, until the input ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from internvl_client.cli import CommandFailure, describe
from internvl_client.cli_session import ChatSession
from internvl_client.client import Conversation
from internvl_client.content import Media
from internvl_client.errors import InternVLError, InvalidRequestError
from internvl_client.media_paths import split_pasted
from internvl_client.types import Answer

_RETRY_TEMPERATURE: Final = 0.7  # greedy decoding would say the same again
_HELP: Final = """\
Type a question. A picture or video goes with it when its path is in the line: drag the file in.
  /image FILE, /video FILE   add a file to the next question
  /retry [TEMPERATURE]       ask the last question again
  /reset                     begin anew: the dialogue is forgotten
  /save FILE                 write the dialogue, as JSON where the name ends so, else as Markdown
  /quit                      leave, as Ctrl-D does; Ctrl-C stops an answer"""


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked in one turn."""

    media: tuple[Media, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Turn:
    """A question that has its answer."""

    question: Question
    answer: Answer


class TypedDialogue:
    """Asks what is typed. `begin` makes a kept conversation; `media` go with the first question.

    Paths in a line count where somebody types; a line that comes from a file or a pipe is taken as it is.
    """

    def __init__(self, session: ChatSession, begin: Callable[[], Conversation], media: Sequence[Media] = ()) -> None:
        self._session = session
        self._console = session.console
        self._begin = begin
        self._conversation = begin()
        self._waiting = list(media)
        self._turns: list[Turn] = []
        self._unanswered: Question | None = None
        self._is_over = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._add_image,
            "/video": self._add_video,
            "/retry": self._retry,
            "/reset": self._reset,
            "/save": self._save,
            "/help": lambda _: self._console.print(_HELP),
            "/quit": lambda _: self._leave(),
        }

    def run(self) -> None:
        """Read and answer lines until the input ends."""
        if self._console.is_terminal:
            self._edit_lines()
            self._console.print("Ask away; /help says what else can be typed.", style="dim")
            for medium in self._waiting:
                self._session.show_medium(medium)
        while not self._is_over and (line := self._read_line()) is not None:
            try:
                self._take(line)
            except CommandFailure as failure:
                self._console.print(str(failure))
            except InternVLError as error:
                self._console.print(describe(error))
                self._set_media_aside(error)
            except KeyboardInterrupt:
                self._console.print("\n(stopped)")

    def _take(self, line: str) -> None:
        word, _, argument = line.partition(" ")
        if command := self._commands.get(word):
            command(argument.strip())
        elif line:
            self._take_question(line)

    def _take_question(self, line: str) -> None:
        paths, text = split_pasted(line) if self._console.is_terminal else ([], line)
        for path in paths:
            self._add(self._session.open_any(path))
        if text.startswith("/") and " " not in text:
            raise CommandFailure(f"there is no command {text}; /help lists them.")
        if text:
            question = Question(tuple(self._waiting), text)
            self._ask(question)

    def _ask(self, question: Question, temperature: float | None = None) -> None:
        self._unanswered = question
        answer = self._session.ask(self._conversation, *question.media, question.text, temperature=temperature)
        self._turns.append(Turn(question, answer))
        self._unanswered = None
        self._waiting.clear()

    def _add(self, medium: Media) -> None:
        self._waiting.append(medium)
        if self._console.is_terminal:
            self._session.show_medium(medium)

    def _add_image(self, argument: str) -> None:
        self._add(self._session.open(_path(argument)))

    def _add_video(self, argument: str) -> None:
        self._add(self._session.open_video(_path(argument)))

    def _retry(self, argument: str) -> None:
        """Ask the last question again, in place of its answer if it has one."""
        temperature = _temperature(argument)
        if self._unanswered is not None:
            self._ask(self._unanswered, temperature)
            return
        if not self._turns:
            raise CommandFailure("nothing has been asked yet.")
        if temperature is None and not self._session.config.temperature:
            temperature = _RETRY_TEMPERATURE
            self._console.print(f"(at temperature {temperature}: at 0 the answer would be the same)", style="dim")
        last = self._turns[-1]
        self._move_to(self._before_last())
        self._turns.pop()
        self._ask(last.question, temperature)

    def _before_last(self) -> Conversation:
        """Return a conversation as it was before the last turn."""
        if len(self._turns) == 1:
            return self._begin()
        kept = self._turns[-2].answer.message_id
        if not kept:
            raise CommandFailure("the answer before was not kept, so that the last question cannot be taken back.")
        return self._conversation.fork(at=kept)

    def _reset(self, argument: str) -> None:
        self._move_to(self._begin())
        self._turns.clear()
        self._waiting.clear()
        self._unanswered = None
        self._console.print("(a new dialogue)", style="dim")

    def _move_to(self, conversation: Conversation) -> None:
        left, self._conversation = self._conversation, conversation
        with suppress(InternVLError):  # what is not deleted is forgotten in time
            left.delete()

    def _save(self, argument: str) -> None:
        target = _path(argument)
        as_json = target.suffix.lower() == ".json"
        text = _as_json(self._turns, self._session.names) if as_json else _as_markdown(self._turns, self._session.names)
        try:
            target.expanduser().write_text(text, encoding="utf-8")
        except OSError as error:
            raise CommandFailure(f"cannot write {target}: {error.strerror}.") from None
        self._console.print(f"{len(self._turns)} turns are in {target}.")

    def _leave(self) -> None:
        self._is_over = True

    def _set_media_aside(self, error: InternVLError) -> None:
        if self._waiting and isinstance(error, InvalidRequestError):
            self._waiting.clear()
            self._unanswered = None
            self._console.print("The media are set aside; add the good ones again with /image or /video.")

    def _read_line(self) -> str | None:
        """Return the next line; None at the end of the input. Where somebody types, Ctrl-C drops what was typed."""
        is_typed = self._console.is_terminal
        try:
            return self._console.input("> " if is_typed else "").strip()
        except EOFError:
            self._console.print()
            return None
        except KeyboardInterrupt:
            self._console.print("\n(Ctrl-D leaves)" if is_typed else "")
            return "" if is_typed else None

    def _edit_lines(self) -> None:
        """Give the prompt line editing, and Tab the names of commands and files."""
        with suppress(ImportError):
            import readline

            def complete(text: str, state: int) -> str | None:
                found = completions(readline.get_line_buffer(), text, self._commands)
                return found[state] if state < len(found) else None

            readline.set_completer_delims(" ")
            readline.set_completer(complete)
            readline.parse_and_bind("tab: complete")


def completions(line: str, text: str, commands: Iterable[str]) -> list[str]:
    """Return what the word `text`, the last of `line`, may become."""
    if line == text and text.startswith("/") and (named := [name for name in commands if name.startswith(text)]):
        return [f"{name} " for name in named]
    base, _, start = text.rpartition("/")
    folder = Path(f"{base}/" if text.startswith("/") or base else ".").expanduser()
    try:
        entries = sorted(entry for entry in folder.iterdir() if entry.name.startswith(start))
    except (OSError, RuntimeError):
        return []
    lead = text[: len(text) - len(start)]
    return [f"{lead}{entry.name}{'/' if entry.is_dir() else ''}" for entry in entries]


def _path(argument: str) -> Path:
    """Return the file that a command names: plain, quoted or escaped."""
    if not argument:
        raise CommandFailure("name a file behind the command.")
    paths, rest = split_pasted(argument)
    return paths[0] if len(paths) == 1 and not rest else Path(argument.strip("'\""))


def _temperature(argument: str) -> float | None:
    if not argument:
        return None
    with suppress(ValueError):
        if (value := float(argument)) >= 0:
            return value
    raise CommandFailure("a temperature is a number of at least 0.")


def _as_markdown(turns: Sequence[Turn], names: dict[str, str]) -> str:
    written = [
        f"**You:** {''.join(f'[{names[medium.digest]}] ' for medium in turn.question.media)}{turn.question.text}\n\n"
        f"**{turn.answer.model}:** {turn.answer.text}\n"
        for turn in turns
    ]
    return "\n".join(written)


def _as_json(turns: Sequence[Turn], names: dict[str, str]) -> str:
    written = [
        {
            "media": [{"name": names[medium.digest], "digest": medium.digest} for medium in turn.question.media],
            "question": turn.question.text,
            "answer": turn.answer.text,
            "model": turn.answer.model,
            "request_id": turn.answer.request_id,
            "output_tokens": turn.answer.usage.num_output_tokens,
        }
        for turn in turns
    ]
    return json.dumps(written, indent=1, ensure_ascii=False) + "\n"
