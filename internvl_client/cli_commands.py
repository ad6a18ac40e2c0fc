"""The commands that need a gateway and nothing else: `internvl chat` and `internvl status`."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from internvl_client.cli import CommandFailure, describe
from internvl_client.cli_output import open_console, show_answer
from internvl_client.client import Client, Conversation
from internvl_client.errors import InternVLError, InvalidRequestError
from internvl_client.running import find_running
from internvl_client.types import Answer, GenerationConfig, Image, Part

app = typer.Typer(
    help="InternVL vision-language models, served. Start a system with `internvl up`, ask it with `internvl chat`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Frames only where somebody looks; plain lines for files and pipes.
    rich_markup_mode="rich" if sys.stdout.isatty() and sys.stderr.isatty() else None,
)

AddressOption = Annotated[
    str | None,
    typer.Option(
        envvar="INTERNVL_ADDRESS",
        metavar="HOST:PORT",
        help="The gateway. Without it: the system that `internvl up` runs on this machine.",
    ),
]
ImageOption = Annotated[
    list[Path] | None,
    typer.Option("--image", "-i", exists=True, dir_okay=False, readable=True, help="A picture; may be repeated."),
]


@app.command()
def chat(
    question: Annotated[str | None, typer.Argument(help="Without one: a prompt for a conversation.")] = None,
    image: ImageOption = None,
    address: AddressOption = None,
    system: Annotated[str | None, typer.Option(help="System message instead of the model's own.")] = None,
    max_tiles: Annotated[int | None, typer.Option(min=1, help="Most tiles a picture is cut into.")] = None,
    max_output_tokens: Annotated[int, typer.Option(min=1, max=1_000_000, help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Keeps the likeliest tokens that sum to this.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="Makes sampling repeatable.")] = None,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds that an answer may take.")] = None,
) -> None:
    """Ask about pictures; the answer streams, then what it cost.

    Without a question: a conversation. `/image FILE` adds a picture to the next question, `/quit` or Ctrl-D ends it.
    """
    config = GenerationConfig(max_output_tokens=max_output_tokens, temperature=temperature, top_p=top_p, seed=seed)
    session = ChatSession(open_console(), config, max_tiles)
    pictures = [session.open(path) for path in image or ()]
    with Client(find_address(address), timeout_s=timeout) as client:
        if question is not None:
            stream = client.stream(*pictures, question, config=config, system_message=system)
            show_answer(session.console, stream, session.names)
        else:
            session.converse(client.create_conversation(system_message=system), pictures)


@app.command()
def status(address: AddressOption = None) -> None:
    """Say whether the gateway serves; exit 0 if it does."""
    found = find_address(address)
    with Client(found) as client:
        if not client.is_ready():
            raise CommandFailure(f"the gateway at {found} runs but is not ready: its models are still loading.")
    open_console().print(f"The gateway at {found} is ready.")


def find_address(given: str | None) -> str:
    """Return the gateway's address: the one given, or that of the system running here."""
    if given:
        return given
    system = find_running()
    if system is None:
        raise CommandFailure(
            "nothing runs here. Start a system with `internvl up --model DIR`, "
            "or name a gateway with --address HOST:PORT (or INTERNVL_ADDRESS)."
        )
    return system.address


class ChatSession:
    """A dialogue at the terminal. Knows the names of the pictures that were opened."""

    def __init__(self, console: Console, config: GenerationConfig, max_tiles: int | None = None) -> None:
        self.console = console
        self.names: dict[str, str] = {}
        self._config = config
        self._max_tiles = max_tiles

    def open(self, path: Path, max_tiles: int | None = None) -> Image:
        """Return the picture in a file; raise `CommandFailure` when it cannot be read.

        `max_tiles` None takes what the session was made with.
        """
        try:
            picture = Image.open(path.expanduser(), max_tiles=max_tiles or self._max_tiles)
        except OSError as error:
            raise CommandFailure(f"cannot read {path}: {error.strerror}.") from None
        self.names[picture.digest] = path.name
        return picture

    def ask(self, conversation: Conversation, *parts: Part) -> Answer:
        """Ask one question, show the answer and return it."""
        return show_answer(self.console, conversation.stream(*parts, config=self._config), self.names)

    def converse(self, conversation: Conversation, pictures: list[Image]) -> None:
        """Ask what is typed until the input ends; `pictures` go with the first question."""
        with suppress(ImportError):
            import readline  # noqa: F401  gives the prompt its line editing
        waiting = list(pictures)
        while (line := self._read_line()) is not None:
            command, _, argument = line.partition(" ")
            if command == "/quit":
                return
            try:
                if command == "/image":
                    waiting.append(self.open(Path(argument.strip().strip("'\""))))
                elif line:
                    self.ask(conversation, *waiting, line)
                    waiting.clear()
            except CommandFailure as failure:
                self.console.print(str(failure))
            except InternVLError as error:
                self.console.print(describe(error))
                if waiting and isinstance(error, InvalidRequestError):
                    waiting.clear()
                    self.console.print("The pictures are set aside; add the good ones again with /image.")
            except KeyboardInterrupt:
                self.console.print("\n(stopped)")

    def _read_line(self) -> str | None:
        try:
            return self.console.input("> " if self.console.is_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            self.console.print()
            return None
