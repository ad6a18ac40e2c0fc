"""What is asked about pictures: turns of text and pictures with the answers that are right."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from examples.nano.world.scene import Scene


class Kind(StrEnum):
    """What a question asks for; accuracy is measured by kind."""

    SHAPE = "shape"
    COLOUR = "colour"
    OBJECT = "object"
    DESCRIBE = "describe"
    COUNT = "count"
    POSITION = "position"
    PRESENCE = "presence"
    NUMBER = "number"
    DIGIT = "digit"
    WORD = "word"
    CHART = "chart"
    COMPARE = "compare"
    COMPARE_THREE = "compare three"
    DIRECTION = "direction"
    CHANGE = "change"
    FRAME = "frame"
    FOLLOW_UP = "follow-up"
    GROUNDING = "grounding"
    ABSENT = "absent"
    REFUSAL = "refusal"
    TALK = "talk"


@dataclass(frozen=True, slots=True)
class Shown:
    """Pictures at one place of the text, by their index in the situation; several are the combined form."""

    media: tuple[int, ...]


Part = str | Shown


@dataclass(frozen=True, slots=True)
class Turn:
    """What the user says, in reading order, and the right answer."""

    parts: tuple[Part, ...]
    answer: str
    kind: Kind

    @property
    def question(self) -> str:
        """The text, without the pictures."""
        return "".join(part for part in self.parts if isinstance(part, str)).strip()

    def after(self, *lead: Part) -> "Turn":
        """Return the turn with parts before it, its text on a new line after a picture."""
        gap = ("\n",) if lead and isinstance(lead[-1], Shown) else ()
        return Turn(_joined((*lead, *gap, *self.parts)), self.answer, self.kind)


Dialogue = tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Medium:
    """A picture as it is sent; `max_tiles` None leaves the tiling to the model."""

    scene: Scene
    max_tiles: int | None = None


@dataclass(frozen=True, slots=True)
class Situation:
    """Pictures and dialogues about them. Every dialogue begins afresh; `system_message` None is the model's own."""

    media: tuple[Medium, ...]
    dialogues: tuple[Dialogue, ...]
    system_message: str | None = None


def _joined(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    return tuple(_merge(iter(parts)))


def _merge(parts: Iterator[Part]) -> Iterator[Part]:
    text = ""
    for part in parts:
        if isinstance(part, str):
            text += part
            continue
        if text:
            yield text
        text = ""
        yield part
    if text:
        yield text
