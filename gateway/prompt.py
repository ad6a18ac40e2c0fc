"""What goes to the model: turns of text, embedding handles and calls of tools."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TypeAlias

from gateway.content import MediaPart, Medium, Part, Role, TextPart, ToolCall
from gateway.dialogue import Dialogue


@dataclass(frozen=True, slots=True)
class EmbeddingHandle:
    """Names an embedding. `message` is the vision service's own words, passed on unread. No frames: a picture."""

    digest: str
    tile_count: int
    token_count: int
    message: bytes
    frame_count: int = 0


@dataclass(frozen=True, slots=True)
class TextSegment:
    """Plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class VisualSegment:
    """Pictures that share one run of the prompt, or the frame of this number of one video."""

    handles: tuple[EmbeddingHandle, ...]
    frame: int | None = None


Segment: TypeAlias = TextSegment | VisualSegment | ToolCall


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says. No two text segments are neighbours."""

    role: Role
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may ask to be called. No schema: it takes no arguments."""

    name: str
    description: str = ""
    parameters_json_schema: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A dialogue that ends with a user's or a tool's turn. `system_message` None: the model's own."""

    system_message: str | None
    turns: tuple[Turn, ...]
    tools: tuple[Tool, ...] = ()


def prompt_of(dialogue: Dialogue, handles: Mapping[Medium, EmbeddingHandle], tools: Sequence[Tool] = ()) -> Prompt:
    """Return the prompt in which each medium of the dialogue is its handle; every result of a tool is its own turn."""
    turns = tuple(Turn(message.role, segments_of(message.parts, handles)) for message in dialogue.messages)
    return Prompt(dialogue.system_message, turns, tuple(tools))


def with_newlines(parts: Iterable[Part]) -> list[Part]:
    """Return `parts` as they are to be read: no empty texts, neighbouring texts joined, newlines between.

    A newline comes after every media part that another media part follows, or text that does not begin with white
    space, and before a video that text precedes which does not end with a newline: its frames are lines of their own.
    """
    said = _joined(part for part in parts if not isinstance(part, TextPart) or part.text)
    spaced = [piece for part, following in pairwise(said) for piece in (part, *_between(part, following))]
    return _joined([*spaced, *said[-1:]])


def segments_of(parts: Iterable[Part], handles: Mapping[Medium, EmbeddingHandle]) -> tuple[Segment, ...]:
    """Return what the model reads for the parts of one message; a video becomes its frames, one on each line."""
    segments = [segment for part in with_newlines(parts) for segment in _segments(part, handles)]
    return tuple(joined_text(segments))


def _segments(part: Part, handles: Mapping[Medium, EmbeddingHandle]) -> Iterator[Segment]:
    match part:
        case TextPart():
            yield TextSegment(part.text)
        case ToolCall():
            yield part
        case MediaPart() if part.is_video:
            yield from _frames(handles[part.media[0]])
        case MediaPart():
            yield VisualSegment(tuple(handles[medium] for medium in part.media))


def _frames(handle: EmbeddingHandle) -> Iterator[Segment]:
    """Yield the card's form of a video: `Frame1: <frame>`, `Frame2: <frame>` and so on."""
    for frame in range(handle.frame_count):
        yield TextSegment(f"{'' if frame == 0 else chr(10)}Frame{frame + 1}: ")
        yield VisualSegment((handle,), frame)


def _between(part: Part, following: Part) -> Iterator[TextPart]:
    match part, following:
        case MediaPart(), MediaPart():
            yield TextPart("\n")
        case MediaPart(), TextPart() if not following.text[0].isspace():
            yield TextPart("\n")
        case TextPart(), MediaPart() if following.is_video and not part.text.endswith("\n"):
            yield TextPart("\n")


def _joined(parts: Iterable[Part]) -> list[Part]:
    joined: list[Part] = []
    for is_text, run in groupby(parts, lambda part: isinstance(part, TextPart)):
        if is_text:
            joined.append(TextPart("".join(part.text for part in run if isinstance(part, TextPart))))
        else:
            joined.extend(run)
    return joined


def joined_text(segments: Iterable[Segment]) -> Iterator[Segment]:
    """Yield the segments with neighbouring texts made one: the model reads a text best in one piece."""
    for is_text, run in groupby(segments, lambda segment: isinstance(segment, TextSegment)):
        if is_text:
            yield TextSegment("".join(segment.text for segment in run if isinstance(segment, TextSegment)))
        else:
            yield from run
