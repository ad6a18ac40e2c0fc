"""What the service is asked: turns of text, visual embeddings and calls of tools."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from llm_service.prompt import json_text
from shared.embedding import DataType, EmbeddingKey
from shared.errors import EmptyMessage, InvalidRequest

TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MAX_TOOLS = 128


class Role(Enum):
    """Who speaks."""

    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


# Who may have spoken before; None is the beginning. The results of several calls are turns one after another.
_MAY_FOLLOW: dict[Role, tuple[Role | None, ...]] = {
    Role.USER: (None, Role.ASSISTANT),
    Role.ASSISTANT: (Role.USER, Role.TOOL),
    Role.TOOL: (Role.ASSISTANT, Role.TOOL),
}


@dataclass(frozen=True, slots=True)
class EmbeddingRef:
    """Names an embedding [token_count, hidden_size] and the vision replica (`host:port`) that can stream it.

    The rows of a video are those of its `frame_count` frames, equally many each, in order; zero means a picture.
    `handle` is what that replica has to be shown. References are equal whatever handle they came with.
    """

    digest: str
    tile_count: int
    token_count: int
    hidden_size: int
    data_type: DataType
    source: str
    frame_count: int = 0
    media_digest: str = ""
    tenant: str = ""
    handle: bytes = field(default=b"", compare=False, repr=False)

    @property
    def key(self) -> EmbeddingKey:
        """What the caches call the embedding."""
        return EmbeddingKey(self.digest, self.media_digest, self.tenant)


@dataclass(frozen=True, slots=True)
class TextSegment:
    """Plain text; control tokens typed in it stay text."""

    text: str


@dataclass(frozen=True, slots=True)
class VisualSegment:
    """Embeddings that share one `<img> ... </img>` run; with `frame`, from 0, that frame of the one embedding."""

    embeddings: tuple[EmbeddingRef, ...]
    frame: int | None = None

    @property
    def slices(self) -> tuple["EmbeddingSlice", ...]:
        """The rows that are shown, embedding by embedding."""
        if self.frame is None:
            return tuple(EmbeddingSlice(ref, 0, ref.token_count) for ref in self.embeddings)
        (ref,) = self.embeddings
        length = ref.token_count // ref.frame_count
        return (EmbeddingSlice(ref, self.frame * length, length),)


@dataclass(frozen=True, slots=True)
class EmbeddingSlice:
    """Rows `offset` to `offset + length` of an embedding."""

    ref: EmbeddingRef
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class ToolCallSegment:
    """A call that the model asked for; `arguments_json` is a JSON object."""

    name: str
    arguments_json: str


Segment = TextSegment | VisualSegment | ToolCallSegment


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may ask to be called; an empty schema means that it takes no arguments."""

    name: str
    description: str = ""
    parameters_json_schema: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says, in reading order."""

    role: Role
    segments: tuple[Segment, ...]

    @property
    def is_empty(self) -> bool:
        """Whether nothing is said."""
        return not any(segment.text if isinstance(segment, TextSegment) else True for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Turns from user to user or tool; the last says something. No system message: the model's own.

    With `grounding` the markers `<ref>`, `<box>`, `<quad>` and their ends are the model's own tokens in what users say.
    `tenant` is who shares what is computed for it with nobody; empty: it is shared.
    """

    turns: tuple[Turn, ...]
    system_message: str | None = None
    tools: tuple[Tool, ...] = ()
    grounding: bool = False
    tenant: str = ""

    @property
    def slices(self) -> tuple[EmbeddingSlice, ...]:
        """Every run of visual tokens, in reading order."""
        return tuple(run for visual in self._visuals() for run in visual.slices)

    @property
    def embeddings(self) -> tuple[EmbeddingRef, ...]:
        """Every embedding, in reading order; a video once for each of its frames."""
        return tuple(run.ref for run in self.slices)

    @property
    def num_visual_tokens(self) -> int:
        """Positions of the prompt that stand for media."""
        return sum(run.length for run in self.slices)

    @property
    def num_characters(self) -> int:
        """Characters of all text, the template's own not counted."""
        tools = sum(len(tool.name) + len(tool.description) + len(tool.parameters_json_schema) for tool in self.tools)
        said = sum(_num_characters(segment) for turn in self.turns for segment in turn.segments)
        return said + tools + len(self.system_message or "")

    @property
    def uses_tools(self) -> bool:
        """Whether anything in it needs a model with a form for tools."""
        called = any(isinstance(segment, ToolCallSegment) for turn in self.turns for segment in turn.segments)
        return bool(self.tools) or called or any(turn.role is Role.TOOL for turn in self.turns)

    def __post_init__(self) -> None:
        """Raise `InvalidRequest` if the turns are in no order that a template knows, or hold what they may not."""
        if not self.turns or self.turns[-1].role is Role.ASSISTANT:
            raise InvalidRequest("The dialogue has to end with a user turn or a tool's.", field="prompt.turns")
        previous: Role | None = None
        for index, turn in enumerate(self.turns):
            if previous not in _MAY_FOLLOW[turn.role]:
                raise InvalidRequest(
                    "User (or tools) and assistant have to alternate.", field=f"prompt.turns[{index}].role"
                )
            _check_segments(turn, f"prompt.turns[{index}].segments")
            previous = turn.role
        if self.turns[-1].role is Role.USER and self.turns[-1].is_empty:
            raise EmptyMessage("The message to answer has neither text nor media.", field="prompt.turns")
        _check_tools(self.tools)

    def _visuals(self) -> Iterator[VisualSegment]:
        for turn in self.turns:
            yield from (segment for segment in turn.segments if isinstance(segment, VisualSegment))


def _num_characters(segment: Segment) -> int:
    match segment:
        case TextSegment(text):
            return len(text)
        case ToolCallSegment(name, arguments_json):
            return len(name) + len(arguments_json)
        case VisualSegment():
            return 0


def _check_segments(turn: Turn, field: str) -> None:
    for segment in turn.segments:
        match segment:
            case VisualSegment():
                _require(turn.role is Role.USER, "Only user turns hold pictures.", field)
                _check_frame(segment, field)
            case ToolCallSegment():
                _require(turn.role is Role.ASSISTANT, "Only the model's own turns hold calls of tools.", field)
                _check_named_object(segment.name, segment.arguments_json, "arguments", field)
            case TextSegment():
                pass


def _check_frame(segment: VisualSegment, field: str) -> None:
    if segment.frame is None:
        return
    _require(len(segment.embeddings) == 1, "A frame is one of one video.", field)
    ref = segment.embeddings[0]
    _require(0 <= segment.frame < ref.frame_count, f"The medium has {ref.frame_count} frames.", field)
    _require(ref.token_count % ref.frame_count == 0, "The frames of a video have equally many tokens.", field)


def _check_tools(tools: tuple[Tool, ...]) -> None:
    _require(len(tools) <= MAX_TOOLS, f"At most {MAX_TOOLS} tools are allowed.", "prompt.tools")
    _require(len({tool.name for tool in tools}) == len(tools), "Tools differ in name.", "prompt.tools")
    for index, tool in enumerate(tools):
        schema = tool.parameters_json_schema or "{}"
        _check_named_object(tool.name, schema, "parameters", f"prompt.tools[{index}]")


def _check_named_object(name: str, text: str, what: str, field: str) -> None:
    allowed = "A tool's name has 1 to 64 letters, digits, `_`, `-` and `.`."
    _require(TOOL_NAME.fullmatch(name) is not None, allowed, field)
    try:
        json_text.read_object(text)
    except ValueError:
        raise InvalidRequest(f"A tool's {what} are a JSON object.", field=field) from None


def _require(condition: bool, message: str, field: str) -> None:
    if not condition:
        raise InvalidRequest(message, field=field)
