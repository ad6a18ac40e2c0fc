"""What is said: messages of text and pictures."""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TypeAlias


class Role(StrEnum):
    """Who speaks."""

    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class PreprocessOptions:
    """How a picture is tiled; None leaves a choice to the checkpoint."""

    max_tiles: int | None = None
    thumbnail: bool | None = None


@dataclass(frozen=True, slots=True)
class Medium:
    """A picture: its identity is its digest and how it is tiled.

    `content` are its bytes when they came with the request; `digest` is empty until those have been hashed.
    """

    digest: str
    options: PreprocessOptions = PreprocessOptions()
    content: bytes | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class TextPart:
    """Plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class MediaPart:
    """Pictures that share one place in the prompt: a single one, or a group in the card's combined form."""

    media: tuple[Medium, ...]
    grouped: bool = False


Part: TypeAlias = TextPart | MediaPart


@dataclass(frozen=True, slots=True)
class Message:
    """One entry of a dialogue; id and time are set on those that are kept."""

    role: Role
    parts: tuple[Part, ...]
    message_id: str = ""
    create_time: datetime | None = None

    @property
    def media(self) -> tuple[Medium, ...]:
        """Its media in order of appearance."""
        return tuple(medium for part in self.parts if isinstance(part, MediaPart) for medium in part.media)

    @property
    def text_chars(self) -> int:
        """Its characters of text."""
        return sum(len(part.text) for part in self.parts if isinstance(part, TextPart))

    @property
    def is_empty(self) -> bool:
        """Whether it has neither text nor media."""
        return not self.media and not self.text_chars
