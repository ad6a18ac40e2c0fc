"""Questions as lines of JSON: ours, and those that are written for OpenAI's batches.

A line of ours has `question`, and before it the pictures of `image`, `images` and the video of `video`; or it has
OpenAI's `messages`. `id` names it, `system` and `options` are its own. docs/command-line.md has the whole schema.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from internvl_client.content import DETAIL_TILES, Image, Message, Part, Role, Video
from internvl_client.types import ChatOptions, Question

_OURS: Final = frozenset({"id", "question", "image", "images", "video", "messages", "system", "options"})
_ROLES: Final = {"user": Role.USER, "assistant": Role.ASSISTANT, "tool": Role.TOOL}
# What is common among OpenAI's clients and says nothing to us.
_IGNORED: Final = frozenset({"model", "stream", "user", "metadata", "store", "service_tier"})
_ALIASES: Final = {
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "stop": "stop_sequences",
    "n": "candidate_count",
}


class LineError(ValueError):
    """A line that cannot be asked; the message says why."""


@dataclass(frozen=True, slots=True)
class MediumOptions:
    """How the media of a line are seen; None leaves it to what holds for all lines."""

    max_tiles: int | None = None
    num_segments: int | None = None


class MediaFiles:
    """Media by where they are: files below `folder`, and data URLs. Reads each file once.

    `defaults` hold for lines that say nothing. Raises `OSError` for a file that cannot be read.
    """

    def __init__(self, folder: Path, defaults: MediumOptions | None = None) -> None:
        self._folder = folder
        self._defaults = defaults or MediumOptions()
        self._read: dict[str, tuple[str, bytes]] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes that are in memory."""
        return sum(len(content) for _, content in self._read.values())

    def image(self, where: str, options: MediumOptions) -> Image:
        """Return the picture."""
        digest, content = self._content(where)
        return Image(digest, content, options.max_tiles or self._defaults.max_tiles)

    def video(self, where: str, options: MediumOptions) -> Video:
        """Return the video."""
        digest, content = self._content(where)
        segments = options.num_segments or self._defaults.num_segments
        return Video(digest, content, segments, max_tiles=options.max_tiles or self._defaults.max_tiles)

    def _content(self, where: str) -> tuple[str, bytes]:
        if where not in self._read:
            content = _data_of(where) if where.startswith("data:") else self._path(where).read_bytes()
            self._read[where] = hashlib.sha256(content).hexdigest(), content
        return self._read[where]

    def _path(self, where: str) -> Path:
        if where.startswith("file://"):
            where = unquote(urlsplit(where).path)
        return self._folder / Path(where).expanduser()


Opening = Callable[[MediaFiles], Part]


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One question: its id, what it says with its media not yet opened, and its options."""

    identity: str | int
    num_chars: int
    messages: tuple[tuple[Role, tuple[Opening, ...]], ...]
    options: ChatOptions

    def question(self, files: MediaFiles) -> Question:
        """Return the question with its media. Raises `OSError` where one cannot be read."""
        messages = (Message(role, tuple(opening(files) for opening in openings)) for role, openings in self.messages)
        return Question(tuple(messages), self.options)


def read_lines(file: Path) -> Iterator[BatchLine]:
    """Yield the questions of a file, empty lines left out. Raises `LineError`, which names the line, and `OSError`."""
    with file.open(encoding="utf-8") as lines:
        for number, line in _numbered(lines):
            if line.strip():
                try:
                    yield _line_of(json.loads(line), number, len(line))
                except json.JSONDecodeError:
                    raise LineError(f"line {number} is no JSON.") from None
                except LineError as error:
                    raise LineError(f"line {number}: {error}") from None


def _numbered(lines: Iterator[str]) -> Iterator[tuple[int, str]]:
    number = 0
    while True:
        number += 1
        try:
            line = next(lines)
        except StopIteration:
            return
        except UnicodeDecodeError:
            raise LineError(f"line {number} or one soon after it is no UTF-8.") from None
        yield number, line


def _line_of(entry: Any, number: int, num_chars: int) -> BatchLine:
    if not isinstance(entry, dict):
        raise LineError("it is no JSON object.")
    if "body" in entry:  # OpenAI's: {"custom_id": .., "method": .., "url": .., "body": {..}}
        entry = _from_openai(entry)
    if unknown := sorted(entry.keys() - _OURS):
        raise LineError(f"{unknown[0]} is unknown; known are {', '.join(sorted(_OURS))}.")
    identity = entry.get("id", number)
    if not isinstance(identity, str | int) or isinstance(identity, bool) or identity == "":
        raise LineError("id has to be a text or a whole number.")
    options, medium = _options_of(_typed(entry, "options", dict) or {})
    messages = _messages_of(entry, medium)
    if messages and messages[0][0] == "system":
        options["system_message"] = _joined(messages.pop(0)[1])
    if (system := _typed(entry, "system", str)) is not None:
        options["system_message"] = system
    if not messages:
        raise LineError("it asks nothing: give question, or messages.")
    said = tuple((_role_of(role), tuple(map(_opening, parts))) for role, parts in messages)
    return BatchLine(identity, num_chars, said, options)


# A part before it is opened: its kind, where it is or what it says, and how it is seen.
_Said = tuple[str, str, MediumOptions]


def _messages_of(entry: Mapping[str, Any], medium: MediumOptions) -> list[tuple[str, list[_Said]]]:
    """Return roles and parts, however the line writes them."""
    if (messages := _typed(entry, "messages", list)) is not None:
        if entry.keys() & {"question", "image", "images", "video"}:
            raise LineError("give messages, or question with its media, not both.")
        return [_openai_message(message, medium) for message in messages]
    pictures = [*([entry["image"]] if "image" in entry else []), *(_typed(entry, "images", list) or [])]
    if not all(isinstance(picture, str) for picture in pictures):
        raise LineError("image and images have to name files.")
    parts: list[_Said] = [("image", picture, medium) for picture in pictures]
    if (video := _typed(entry, "video", str)) is not None:
        parts.append(("video", video, medium))
    if (question := _typed(entry, "question", str)) is not None:
        parts.append(("text", question, medium))
    for kind, where, _ in parts:
        _check_place(kind, where)
    return [("user", parts)] if parts else []


def _openai_message(message: Any, medium: MediumOptions) -> tuple[str, list[_Said]]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise LineError("a message has to be an object with a role.")
    content = message.get("content")
    if isinstance(content, str):
        return message["role"], [("text", content, medium)]
    if not isinstance(content, list):
        raise LineError("a message's content has to be a text or a list of parts.")
    return message["role"], [_openai_part(part, medium) for part in content]


def _openai_part(part: Any, medium: MediumOptions) -> _Said:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return "text", part["text"], medium
    if kind not in ("image_url", "video_url"):
        raise LineError("a part has to be of the type text, image_url or video_url.")
    place = part.get(kind)
    where = place.get("url") if isinstance(place, dict) else place
    if not isinstance(where, str):
        raise LineError(f"{kind} has no url.")
    name = kind.removesuffix("_url")
    _check_place(name, where)
    detail = place.get("detail") if isinstance(place, dict) else None
    if detail is None:
        return name, where, medium
    if detail not in DETAIL_TILES:
        raise LineError(f"detail is one of {', '.join(DETAIL_TILES)}.")
    return name, where, MediumOptions(DETAIL_TILES[detail], medium.num_segments)


def _opening(part: _Said) -> Opening:
    kind, said, options = part
    if kind == "image":
        return lambda files: files.image(said, options)
    if kind == "video":
        return lambda files: files.video(said, options)
    return lambda files: said


def _check_place(kind: str, where: str) -> None:
    if kind == "text":
        return
    if where.startswith(("http://", "https://")):
        raise LineError("media are files or data URLs; download what is elsewhere first.")
    if where.startswith("data:"):
        _data_of(where)


def _data_of(url: str) -> bytes:
    header, _, data = url.partition(",")
    try:
        return base64.b64decode(data, validate=True) if header.endswith(";base64") else unquote(data).encode()
    except (binascii.Error, ValueError):
        raise LineError("a data URL is no base64.") from None


def _from_openai(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the line that says the same in our words."""
    body = entry["body"]
    if not isinstance(body, dict):
        raise LineError("body has to be an object.")
    options = {name: value for name, value in body.items() if name not in _IGNORED and name != "messages"}
    if (wanted := options.pop("response_format", None)) is not None:
        options |= _schema_of(wanted)
    ours = {"messages": body.get("messages", []), "options": options}
    return ours | ({"id": entry["custom_id"]} if "custom_id" in entry else {})


def _schema_of(wanted: Any) -> dict[str, Any]:
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "text":
        return {}
    schema = wanted.get("json_schema") if kind == "json_schema" else None
    if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
        raise LineError("response_format has to be of the type text, or json_schema with a schema.")
    return {"json_schema": schema["schema"]}


_NUMBER: Final = (int, float)
_OPTIONS: Final[Mapping[str, tuple[type, ...]]] = {
    "max_output_tokens": (int,),
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "top_k": (int,),
    "min_p": _NUMBER,
    "repetition_penalty": _NUMBER,
    "seed": (int,),
    "stop_sequences": (str, list),
    "num_beams": (int,),
    "candidate_count": (int,),
    "json_schema": (str, dict),
    "grounding": (bool,),
    "max_total_tiles": (int,),
}
_MEDIUM_OPTIONS: Final = ("max_tiles", "num_segments")


def _options_of(written: Mapping[str, Any]) -> tuple[ChatOptions, MediumOptions]:
    """Return how an answer is made, and how media are seen."""
    options: dict[str, Any] = {}
    medium: dict[str, int] = {}
    for alias, value in written.items():
        name = _ALIASES.get(alias, alias)
        if name in _MEDIUM_OPTIONS:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise LineError(f"{alias} has to be a whole number of at least 1.")
            medium[name] = value
        elif name not in _OPTIONS:
            raise LineError(f"the option {alias} is unknown; known are {', '.join([*_OPTIONS, *_MEDIUM_OPTIONS])}.")
        elif value is not None:
            options[name] = _option(alias, value, _OPTIONS[name])
    return ChatOptions(**options), MediumOptions(**medium)  # type: ignore[typeddict-item]  # checked above, by name


def _option(name: str, value: Any, kinds: tuple[type, ...]) -> Any:
    wrong = LineError(f"the option {name} has a value of the wrong type.")
    if not _is_of(value, kinds):
        raise wrong
    if list not in kinds:
        return value
    sequences = tuple([value] if isinstance(value, str) else value)
    if not all(isinstance(sequence, str) for sequence in sequences):
        raise wrong
    return sequences


def _is_of(value: Any, kinds: tuple[type, ...]) -> bool:
    """Return whether a value is of one of the kinds; true and false are no numbers."""
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)


def _typed(entry: Mapping[str, Any], name: str, kind: type) -> Any:
    value = entry.get(name)
    if value is not None and not isinstance(value, kind):
        raise LineError(f"{name} has a value of the wrong type.")
    return value


def _role_of(role: str) -> Role:
    if role not in _ROLES:
        raise LineError(f"a message of the role {role} cannot stand here; system comes first.")
    return _ROLES[role]


def _joined(parts: list[_Said]) -> str:
    if any(kind != "text" for kind, _, _ in parts):
        raise LineError("a system message has text only.")
    return "".join(text for _, text, _ in parts)
