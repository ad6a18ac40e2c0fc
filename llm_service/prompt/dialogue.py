"""What the service is asked: turns of text and visual embeddings."""

from dataclasses import dataclass
from enum import Enum

from shared.embedding import DataType
from shared.errors import EmptyMessage, InvalidRequest


class Role(Enum):
    """Who speaks."""

    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class EmbeddingRef:
    """Names an embedding [token_count, hidden_size] and the vision replica (`host:port`) that can stream it."""

    digest: str
    tile_count: int
    token_count: int
    hidden_size: int
    data_type: DataType
    source: str


@dataclass(frozen=True, slots=True)
class TextSegment:
    """Plain text; control tokens typed in it stay text."""

    text: str


@dataclass(frozen=True, slots=True)
class VisualSegment:
    """Embeddings that share one `<img> ... </img>` run."""

    embeddings: tuple[EmbeddingRef, ...]


Segment = TextSegment | VisualSegment


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
    """Turns that alternate, from user to user; the last says something. No system message: the model's own."""

    turns: tuple[Turn, ...]
    system_message: str | None = None

    @property
    def embeddings(self) -> tuple[EmbeddingRef, ...]:
        """Every embedding, in reading order."""
        visuals = [part for turn in self.turns for part in turn.segments if isinstance(part, VisualSegment)]
        return tuple(ref for visual in visuals for ref in visual.embeddings)

    @property
    def num_characters(self) -> int:
        """Characters of all text, the template's own not counted."""
        texts = [part.text for turn in self.turns for part in turn.segments if isinstance(part, TextSegment)]
        return sum(map(len, texts)) + len(self.system_message or "")

    def __post_init__(self) -> None:
        """Raise `InvalidRequest` if the turns are in no order that a template knows."""
        if not self.turns or self.turns[-1].role is not Role.USER:
            raise InvalidRequest("The dialogue has to end with a user turn.", field="prompt.turns")
        for index, turn in enumerate(self.turns):
            if turn.role is not (Role.ASSISTANT if index % 2 else Role.USER):
                raise InvalidRequest("User and assistant have to alternate.", field=f"prompt.turns[{index}].role")
            if turn.role is Role.ASSISTANT and not all(isinstance(part, TextSegment) for part in turn.segments):
                raise InvalidRequest("Only user turns hold pictures.", field=f"prompt.turns[{index}].segments")
        if self.turns[-1].is_empty:
            raise EmptyMessage("The message to answer has neither text nor media.", field="prompt.turns")
