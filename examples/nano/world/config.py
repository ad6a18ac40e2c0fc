"""How hard the world is."""

from dataclasses import dataclass, field, replace
from typing import Final

from examples.nano.world.vocabulary import COLOURS, SHAPES, WORDS


@dataclass(frozen=True, slots=True)
class SituationWeights:
    """How often each sort of situation comes up, relative to the others."""

    shapes: float = 0.42
    number: float = 0.10
    word: float = 0.03
    chart: float = 0.02
    nothing: float = 0.01
    compare: float = 0.26
    clip: float = 0.13
    other_picture: float = 0.03


@dataclass(frozen=True, slots=True)
class WorldConfig:
    """What the world holds. Sizes without a unit are fractions; `share` is a chance.

    `thing_size` is a thing's diameter as a part of the picture's longer side, `glyph_height` that of a digit as a part
    of its height; `picture_px` is the square root of the area. `count_weights` say how often there is one thing, how
    often there are two, and so on. `chain_share` is how many situations are one long dialogue and not many short ones.
    Boxes are rounded to `box_step` thousandths.
    """

    colours: tuple[str, ...] = tuple(COLOURS)
    shapes: tuple[str, ...] = SHAPES
    words: tuple[str, ...] = WORDS
    max_things: int = 5
    count_weights: tuple[float, ...] = (5, 5, 5, 3, 2)
    thing_size: tuple[float, float] = (0.20, 0.44)
    glyph_height: tuple[float, float] = (0.20, 0.50)
    max_digits: int = 4
    max_bars: int = 5
    max_frames: int = 5
    small_px: tuple[int, int] = (100, 158)
    large_px: tuple[int, int] = (159, 360)
    large_share: float = 0.3
    max_aspect: float = 1.7
    textured_share: float = 0.4
    colour_jitter: int = 16
    box_step: int = 20
    chain_share: float = 0.12
    weights: SituationWeights = field(default_factory=SituationWeights)


FULL: Final = WorldConfig()
# What training begins with: one or two large things on plain ground, short numbers.
EASY: Final = replace(
    FULL,
    max_things=2,
    thing_size=(0.25, 0.45),
    glyph_height=(0.28, 0.5),
    max_digits=2,
    large_share=0.2,
    max_aspect=1.5,
    textured_share=0.1,
    chain_share=0.0,
    weights=SituationWeights(
        shapes=0.60, number=0.22, word=0.04, chart=0.04, nothing=0.01, compare=0.04, clip=0.04, other_picture=0.01
    ),
)
