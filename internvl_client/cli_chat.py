"""The command that asks questions: `internvl chat`."""

from functools import partial
from pathlib import Path
from typing import Annotated, Final

import typer

from internvl_client.cli import CommandFailure
from internvl_client.cli_dialogue import TypedDialogue
from internvl_client.cli_gateway import AddressOption, open_client
from internvl_client.cli_output import open_console
from internvl_client.cli_session import ChatSession, Clip
from internvl_client.content import Detail, Media
from internvl_client.grounding import Orientation
from internvl_client.types import GenerationConfig

_EXAMPLES: Final = """Examples:

  internvl chat --image cat.jpg "What is this?"

  internvl chat --image cat.jpg --grounding --save-boxes boxes.png "Where is the cat?"

  internvl chat
"""

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


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog=_EXAMPLES)(chat)


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

    Without a question: a conversation, in which pictures are shown and a file that is dragged in goes with the next
    question. Ctrl-C stops an answer, Ctrl-D ends the conversation, `/help` says what else can be typed.
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
    console = open_console()
    session = ChatSession(
        console,
        config,
        max_tiles,
        detail=detail,
        clip=Clip(segments, start, end),
        save_boxes=save_boxes,
        orientation=image_policy,
        brief=question is None and console.is_terminal,
    )
    media: list[Media] = [*map(session.open, image or ()), *map(session.open_video, video or ())]
    with open_client(address, timeout) as client:
        if question is not None:
            session.show(client.stream(*media, question, config=config, system_message=system))
        else:
            TypedDialogue(session, partial(client.create_conversation, system_message=system), media).run()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise CommandFailure(f"cannot read {path} as text.") from None
