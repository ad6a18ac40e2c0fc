"""What is said: messages of text, pictures, videos and calls of tools."""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TypeAlias


class Role(StrEnum):
    """Who speaks."""

    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class VideoOptions:
    """Which frames of a video are seen. No segments: the vision service's default; no bounds: the whole clip."""

    segment_count: int | None = None
    start_s: float | None = None
    end_s: float | None = None


@dataclass(frozen=True, slots=True)
class PreprocessOptions:
    """How a picture is tiled; None leaves a choice to the checkpoint. With `video` the medium is a video."""

    max_tiles: int | None = None
    thumbnail: bool | None = None
    video: VideoOptions | None = None


@dataclass(frozen=True, slots=True)
class Medium:
    """A picture or a video: its identity is its digest and how it is cut.

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
    """What shares one place in the prompt: a picture, a video, or a group of pictures in the card's combined form."""

    media: tuple[Medium, ...]
    grouped: bool = False

    @property
    def is_video(self) -> bool:
        """Whether it is a video."""
        return self.media[0].options.video is not None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """The model's wish that a tool be called; `arguments_json` is a JSON object."""

    name: str
    arguments_json: str
    tool_call_id: str = ""


Part: TypeAlias = TextPart | MediaPart | ToolCall


@dataclass(frozen=True, slots=True)
class Message:
    """One entry of a dialogue; id and time are set on those that are kept. `cut_off`: an answer without its end."""

    role: Role
    parts: tuple[Part, ...]
    message_id: str = ""
    create_time: datetime | None = None
    cut_off: bool = False

    @property
    def media(self) -> tuple[Medium, ...]:
        """Its media in order of appearance."""
        return tuple(medium for part in self.parts if isinstance(part, MediaPart) for medium in part.media)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The tools that it wants called."""
        return tuple(part for part in self.parts if isinstance(part, ToolCall))

    @property
    def text(self) -> str:
        """Its text."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def text_chars(self) -> int:
        """Its characters of text, calls of tools included."""
        return len(self.text) + sum(len(call.name) + len(call.arguments_json) for call in self.tool_calls)

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing at all."""
        return not self.media and not self.text_chars
