"""The commands that need a gateway and nothing else: `internvl chat` and `internvl status`."""

import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from internvl_client.cli import INSTALL_HINT, CommandFailure, describe
from internvl_client.cli_output import open_console, show_answer
from internvl_client.client import AnswerStream, Client, Conversation
from internvl_client.content import Detail, Image, Media, Part, Video
from internvl_client.errors import InternVLError, InvalidRequestError
from internvl_client.grounding import Orientation, draw_boxes, parse_boxes, picture_size
from internvl_client.running import find_running
from internvl_client.types import Answer, GenerationConfig

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
VideoOption = Annotated[
    list[Path] | None,
    typer.Option("--video", exists=True, dir_okay=False, readable=True, help="A video; may be repeated."),
]
SchemaOption = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, readable=True, help="File of a JSON schema that the answer has to meet."),
]
BoxesOption = Annotated[
    Path | None,
    typer.Option(
        "--save-boxes", dir_okay=False, writable=True, help="Draw the answer's boxes on the last picture, as this PNG."
    ),
]
OrientationOption = Annotated[
    Orientation,
    typer.Option(
        "--image-policy", help="How the server sees pictures, for --save-boxes: viewer turns them as EXIF says."
    ),
]


@app.command()
def chat(
    question: Annotated[str | None, typer.Argument(help="Without one: a prompt for a conversation.")] = None,
    image: ImageOption = None,
    video: VideoOption = None,
    address: AddressOption = None,
    system: Annotated[str | None, typer.Option(help="System message instead of the model's own.")] = None,
    max_tiles: Annotated[int | None, typer.Option(min=1, help="Most tiles a picture or frame is cut into.")] = None,
    detail: Annotated[Detail | None, typer.Option(help="OpenAI's word for tiles: low is 6, others 12.")] = None,
    segments: Annotated[int | None, typer.Option(min=1, help="Frames seen of a video; default 8.")] = None,
    start: Annotated[float | None, typer.Option("--from", help="Second where the seen part of a video begins.")] = None,
    end: Annotated[float | None, typer.Option("--to", help="Second at which it ends.")] = None,
    max_output_tokens: Annotated[int, typer.Option(min=1, max=1_000_000, help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Keeps the likeliest tokens that sum to this.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="Makes sampling repeatable.")] = None,
    candidates: Annotated[int, typer.Option(min=1, max=16, help="Answers to generate; the best comes first.")] = 1,
    json_schema: SchemaOption = None,
    grounding: Annotated[bool, typer.Option("--grounding", help="Keep tags of names and boxes in answers.")] = False,
    save_boxes: BoxesOption = None,
    image_policy: OrientationOption = "card",
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds that an answer may take.")] = None,
) -> None:
    """Ask about pictures and videos; the answer streams, then what it cost.

    Without a question: a conversation. `/image FILE` and `/video FILE` add to the next question, `/quit` or Ctrl-D ends
    it.
    """
    if max_tiles is not None and detail is not None:
        raise CommandFailure("give --max-tiles or --detail, not both.")
    config = GenerationConfig(
        max_output_tokens=max_output_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        candidate_count=candidates if candidates > 1 else None,
        json_schema=_read_text(json_schema) if json_schema else "",
        grounding=grounding or save_boxes is not None,
    )
    session = ChatSession(
        open_console(),
        config,
        max_tiles,
        detail=detail,
        clip=Clip(segments, start, end),
        save_boxes=save_boxes,
        orientation=image_policy,
    )
    media: list[Media] = [*map(session.open, image or ()), *map(session.open_video, video or ())]
    with Client(find_address(address), timeout_s=timeout) as client:
        if question is not None:
            session.show(client.stream(*media, question, config=config, system_message=system))
        else:
            session.converse(client.create_conversation(system_message=system), media)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise CommandFailure(f"cannot read {path} as text.") from None


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


@dataclass(frozen=True, slots=True)
class Clip:
    """Which frames of videos are seen; None leaves it to the server."""

    num_segments: int | None = None
    start_s: float | None = None
    end_s: float | None = None


class ChatSession:
    """A dialogue at the terminal. Knows the names of the media that were opened.

    Answers' boxes are drawn on the last picture and written to `save_boxes`, where that is given; `orientation` is how
    the server sees pictures.
    """

    def __init__(
        self,
        console: Console,
        config: GenerationConfig,
        max_tiles: int | None = None,
        *,
        detail: Detail | None = None,
        clip: Clip | None = None,
        save_boxes: Path | None = None,
        orientation: Orientation = "card",
    ) -> None:
        if save_boxes is not None and find_spec("PIL") is None:
            raise CommandFailure(f"drawing boxes needs Pillow: {INSTALL_HINT}")
        self.console = console
        self.names: dict[str, str] = {}
        self._config = config
        self._max_tiles = max_tiles
        self._detail = detail
        self._clip = clip or Clip()
        self._save_boxes = save_boxes
        self._orientation: Orientation = orientation
        self._last_picture: Image | None = None

    def open(self, path: Path, max_tiles: int | None = None) -> Image:
        """Return the picture in a file; raise `CommandFailure` when it cannot be read.

        `max_tiles` None takes what the session was made with.
        """
        tiles = max_tiles or self._max_tiles
        try:
            picture = Image.open(path.expanduser(), max_tiles=tiles, detail=None if tiles else self._detail)
        except OSError as error:
            raise CommandFailure(f"cannot read {path}: {error.strerror}.") from None
        self.names[picture.digest] = path.name
        self._last_picture = picture
        return picture

    def open_video(self, path: Path) -> Video:
        """Return the video in a file; raise `CommandFailure` when it cannot be read."""
        clip = self._clip
        try:
            video = Video.open(
                path.expanduser(),
                num_segments=clip.num_segments,
                start_s=clip.start_s,
                end_s=clip.end_s,
                max_tiles=self._max_tiles,
            )
        except OSError as error:
            raise CommandFailure(f"cannot read {path}: {error.strerror}.") from None
        self.names[video.digest] = path.name
        return video

    def ask(self, conversation: Conversation, *parts: Part) -> Answer:
        """Ask one question, show the answer and return it."""
        return self.show(conversation.stream(*parts, config=self._config))

    def show(self, stream: AnswerStream) -> Answer:
        """Show an answer as it comes, save its boxes where that is wished, and return it."""
        is_single = (self._config.candidate_count or 1) == 1
        answer = show_answer(self.console, stream, self.names, streams=is_single)
        if self._save_boxes is not None:
            self._draw(answer.text, self._save_boxes)
        return answer

    def _draw(self, text: str, target: Path) -> None:
        if self._last_picture is None or self._last_picture.content is None:
            raise CommandFailure("there is no picture to draw boxes on.")
        content = self._last_picture.content
        try:
            boxes = parse_boxes(text, *picture_size(content, orientation=self._orientation))
            if boxes:
                target.write_bytes(draw_boxes(content, boxes, orientation=self._orientation))
        except (OSError, ValueError) as error:
            raise CommandFailure(f"cannot save boxes as {target}: {error}") from None
        note = f"{len(boxes)} drawn on {self.names[self._last_picture.digest]}, {target}" if boxes else "none to draw"
        self.console.print(f"  {'boxes':<8} {note}", style="dim")

    def converse(self, conversation: Conversation, media: list[Media]) -> None:
        """Ask what is typed until the input ends; `media` go with the first question."""
        with suppress(ImportError):
            import readline  # noqa: F401  gives the prompt its line editing
        waiting = list(media)
        while (line := self._read_line()) is not None:
            command, _, argument = line.partition(" ")
            if command == "/quit":
                return
            try:
                if command in ("/image", "/video"):
                    path = Path(argument.strip().strip("'\""))
                    waiting.append(self.open(path) if command == "/image" else self.open_video(path))
                elif line:
                    self.ask(conversation, *waiting, line)
                    waiting.clear()
            except CommandFailure as failure:
                self.console.print(str(failure))
            except InternVLError as error:
                self.console.print(describe(error))
                if waiting and isinstance(error, InvalidRequestError):
                    waiting.clear()
                    self.console.print("The media are set aside; add the good ones again with /image or /video.")
            except KeyboardInterrupt:
                self.console.print("\n(stopped)")

    def _read_line(self) -> str | None:
        try:
            return self.console.input("> " if self.console.is_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            self.console.print()
            return None
