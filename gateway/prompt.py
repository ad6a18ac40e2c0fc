"""What goes to the model: turns of text and embedding handles."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TypeAlias

from gateway.content import MediaPart, Medium, Message, Part, Role, TextPart
from gateway.dialogue import Dialogue


@dataclass(frozen=True, slots=True)
class EmbeddingHandle:
    """Names an embedding. `message` is the vision service's own words, passed on unread."""

    digest: str
    tile_count: int
    token_count: int
    message: bytes


@dataclass(frozen=True, slots=True)
class TextSegment:
    """Plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class VisualSegment:
    """Pictures that share one run of the prompt."""

    handles: tuple[EmbeddingHandle, ...]


Segment: TypeAlias = TextSegment | VisualSegment


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says. No two text segments are neighbours."""

    role: Role
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A dialogue that ends with a user turn. `system_message` None: the model's own."""

    system_message: str | None
    turns: tuple[Turn, ...]


def prompt_of(dialogue: Dialogue, handles: Mapping[Medium, EmbeddingHandle]) -> Prompt:
    """Return the prompt in which each medium of the dialogue is its handle."""
    return Prompt(dialogue.system_message, tuple(_turn(message, handles) for message in dialogue.messages))


def with_newlines(parts: Iterable[Part]) -> list[Part]:
    """Return `parts` as they are to be read: no empty texts, neighbouring texts joined, newlines between.

    A newline comes after every media part that another media part follows, or text that does not begin with white
    space.
    """
    said = _joined(part for part in parts if not isinstance(part, TextPart) or part.text)
    spaced = [piece for part, following in pairwise(said) for piece in (part, *_between(part, following))]
    return _joined([*spaced, *said[-1:]])


def _turn(message: Message, handles: Mapping[Medium, EmbeddingHandle]) -> Turn:
    return Turn(message.role, tuple(_segment(part, handles) for part in with_newlines(message.parts)))


def _segment(part: Part, handles: Mapping[Medium, EmbeddingHandle]) -> Segment:
    if isinstance(part, TextPart):
        return TextSegment(part.text)
    return VisualSegment(tuple(handles[medium] for medium in part.media))


def _between(part: Part, following: Part) -> Iterator[TextPart]:
    if isinstance(part, MediaPart) and (isinstance(following, MediaPart) or not following.text[0].isspace()):
        yield TextPart("\n")


def _joined(parts: Iterable[Part]) -> list[Part]:
    joined: list[Part] = []
    for is_text, run in groupby(parts, lambda part: isinstance(part, TextPart)):
        if is_text:
            joined.append(TextPart("".join(part.text for part in run if isinstance(part, TextPart))))
        else:
            joined.extend(run)
    return joined
