"""What a caller says: messages of text, pictures, videos and calls of tools. All of it immutable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

Detail = Literal["low", "medium", "high", "auto"]
# OpenAI's `detail` as most tiles: LMDeploy's low is 6 and its medium 12. Its high, 24, is twice what the models are
# trained with, so high is 12 here, as is auto.
DETAIL_TILES: Final[Mapping[str, int]] = {"low": 6, "medium": 12, "high": 12, "auto": 12}


class Role(StrEnum):
    """Who speaks."""

    UNSPECIFIED = "UNSPECIFIED"
    USER = "USER"
    ASSISTANT = "ASSISTANT"
    TOOL = "TOOL"


@dataclass(frozen=True, slots=True)
class Image:
    """A picture, named by the SHA-256 of its encoded bytes (JPEG, PNG, WebP, GIF, BMP or TIFF).

    Without `content` the server must hold the bytes already. `max_tiles` (without the thumbnail) and `thumbnail` decide
    how the picture is tiled; None leaves that to the model. `detail` is OpenAI's word for `max_tiles`: "low" is 6;
    "medium", "high" and "auto" are 12. Giving both is a `ValueError`.
    """

    digest: str
    content: bytes | None = field(default=None, repr=False, compare=False)
    max_tiles: int | None = None
    thumbnail: bool | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        max_tiles: int | None = None,
        thumbnail: bool | None = None,
        detail: Detail | None = None,
    ) -> Image:
        """Return the picture in a file; raises `OSError` when it cannot be read. The bytes are not decoded here."""
        return cls.from_bytes(Path(path).read_bytes(), max_tiles=max_tiles, thumbnail=thumbnail, detail=detail)

    @classmethod
    def from_bytes(
        cls,
        content: bytes,
        *,
        max_tiles: int | None = None,
        thumbnail: bool | None = None,
        detail: Detail | None = None,
    ) -> Image:
        """Return the picture that `content` encodes."""
        return cls(hashlib.sha256(content).hexdigest(), content, _most_tiles(max_tiles, detail), thumbnail)

    @classmethod
    def from_digest(
        cls, digest: str, *, max_tiles: int | None = None, thumbnail: bool | None = None, detail: Detail | None = None
    ) -> Image:
        """Return a picture whose bytes the server holds: 64 lower-case hex digits."""
        return cls(digest, None, _most_tiles(max_tiles, detail), thumbnail)


@dataclass(frozen=True, slots=True)
class Video:
    """A video, named by the SHA-256 of its bytes (MP4, MKV, WebM, MOV or AVI). The model sees frames of it.

    These are the middles of `num_segments` equal parts of the clip between `start_s` and `end_s`, in seconds; without
    them, of the whole clip. `num_segments` None is the server's default, 8. `max_tiles` is per frame, and 1 where it is
    None. Without `content` the server must hold the bytes already.
    """

    digest: str
    content: bytes | None = field(default=None, repr=False, compare=False)
    num_segments: int | None = None
    start_s: float | None = None
    end_s: float | None = None
    max_tiles: int | None = None
    thumbnail: bool | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        num_segments: int | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
        max_tiles: int | None = None,
        thumbnail: bool | None = None,
    ) -> Video:
        """Return the video in a file; raises `OSError` when it cannot be read. The bytes are not decoded here."""
        content = Path(path).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        return cls(digest, content, num_segments, start_s, end_s, max_tiles, thumbnail)

    @classmethod
    def from_bytes(
        cls,
        content: bytes,
        *,
        num_segments: int | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
        max_tiles: int | None = None,
        thumbnail: bool | None = None,
    ) -> Video:
        """Return the video that `content` encodes."""
        digest = hashlib.sha256(content).hexdigest()
        return cls(digest, content, num_segments, start_s, end_s, max_tiles, thumbnail)


Media: TypeAlias = Image | Video


@dataclass(frozen=True, slots=True)
class ImageGroup:
    """Several pictures that the model sees as one run of tiles: the model card's combined form."""

    images: tuple[Image, ...]

    @classmethod
    def of(cls, *images: Image) -> ImageGroup:
        """Return the group of `images`, at least one, in order."""
        return cls(images)


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may ask to be called. `parameters` is the JSON schema of its arguments, an object."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | str | None = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """The model's wish that a tool be called."""

    name: str
    arguments_json: str = "{}"
    tool_call_id: str = ""

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments by name."""
        read: dict[str, Any] = json.loads(self.arguments_json)
        return read


Part: TypeAlias = str | Image | ImageGroup | Video | ToolCall


@dataclass(frozen=True, slots=True)
class Message:
    """One entry of a dialogue. `message_id` and `create_time` are set by the server in kept conversations.

    `cut_off`: the turn ended before this answer did, and was kept because of `keep_partial_answer`.

    The server puts a newline after a picture when another picture follows, or text that does not begin with white
    space, and puts the frames of a video on lines of their own; nothing else is inserted between parts.
    """

    role: Role
    parts: tuple[Part, ...]
    message_id: str = ""
    create_time: datetime | None = None
    cut_off: bool = False

    @classmethod
    def user(cls, *parts: Part) -> Message:
        """Return what the person or program that asks says."""
        return cls(Role.USER, parts)

    @classmethod
    def assistant(cls, *parts: Part) -> Message:
        """Return what the model said."""
        return cls(Role.ASSISTANT, parts)

    @classmethod
    def tool(cls, result: str) -> Message:
        """Return what a tool answered; one message for each call, in the order of the calls."""
        return cls(Role.TOOL, (result,))

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The tools that the model wants called."""
        return tuple(part for part in self.parts if isinstance(part, ToolCall))

    @property
    def media(self) -> tuple[Media, ...]:
        """The pictures, those of groups included, and videos, in order."""
        found: list[Media] = []
        for part in self.parts:
            if isinstance(part, Image | Video):
                found.append(part)
            elif isinstance(part, ImageGroup):
                found += part.images
        return tuple(found)

    @property
    def images(self) -> tuple[Image, ...]:
        """The pictures, those of groups included, in order."""
        return tuple(medium for medium in self.media if isinstance(medium, Image))


def _most_tiles(max_tiles: int | None, detail: Detail | None) -> int | None:
    if detail is None:
        return max_tiles
    if max_tiles is not None:
        raise ValueError("Give max_tiles or detail, not both.")
    if detail not in DETAIL_TILES:
        raise ValueError(f"detail is one of {', '.join(DETAIL_TILES)}.")
    return DETAIL_TILES[detail]
