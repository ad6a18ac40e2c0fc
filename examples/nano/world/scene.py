"""What a picture shows, exactly: things, writing and bars with their boxes in pixels."""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from examples.nano.world.vocabulary import PLACES, Rgb

Box = tuple[float, float, float, float]
Point = tuple[float, float]
# A thing nearer than this to the line between two of the nine places is in neither for sure.
PLACE_MARGIN = 0.05


@dataclass(frozen=True, slots=True)
class Background:
    """What lies behind everything: a style, two colours near each other, and a seed for the grain."""

    style: str
    first: Rgb
    second: Rgb
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Thing:
    """A coloured shape. `radius` is that of the circle around it, in pixels; `angle` is in degrees."""

    shape: str
    colour: str
    rgb: Rgb
    x: float
    y: float
    radius: float
    angle: float = 0.0

    @property
    def name(self) -> str:
        """Colour and shape."""
        return f"{self.colour} {self.shape}"

    @property
    def box(self) -> Box:
        """The smallest rectangle around it: left, top, right, bottom."""
        points = self.outline()
        xs, ys = [x for x, _ in points], [y for _, y in points]
        return min(xs), min(ys), max(xs), max(ys)

    def outline(self) -> list[Point]:
        """Return the corners of its outline; four extreme points where it is round."""
        turn = math.radians(0.0 if self.shape in ("circle", "ring") else self.angle)
        cos, sin = math.cos(turn) * self.radius, math.sin(turn) * self.radius
        return [(self.x + x * cos - y * sin, self.y + x * sin + y * cos) for x, y in OUTLINES[self.shape]]


@dataclass(frozen=True, slots=True)
class Writing:
    """A number or a word. `x`, `y` is where drawing begins; the box is that of the ink."""

    text: str
    colour: str
    rgb: Rgb
    face: str
    size_px: int
    x: int
    y: int
    box: Box

    @property
    def is_number(self) -> bool:
        """Whether it is made of digits."""
        return self.text.isdigit()


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of a chart; all stand on one line."""

    colour: str
    rgb: Rgb
    box: Box

    @property
    def height(self) -> float:
        """Pixels from its foot to its top."""
        return self.box[3] - self.box[1]


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn. Of things, writing and bars only one sort is there. Sizes in pixels."""

    width: int
    height: int
    background: Background
    things: tuple[Thing, ...] = ()
    writing: Writing | None = None
    bars: tuple[Bar, ...] = ()

    def place_of(self, box: Box) -> str | None:
        """Return which of the nine places a box's centre is in, or None where that is open to doubt."""
        row = _third((box[1] + box[3]) / 2 / self.height)
        column = _third((box[0] + box[2]) / 2 / self.width)
        return None if row is None or column is None else PLACES[row][column]

    @cached_property
    def places(self) -> tuple[str | None, ...]:
        """The place of each thing."""
        return tuple(self.place_of(thing.box) for thing in self.things)

    def count(self, colour: str | None = None, shape: str | None = None) -> int:
        """Return how many things there are, of a colour or shape if they are given."""
        return len(self.find(colour, shape))

    def find(self, colour: str | None = None, shape: str | None = None) -> list[Thing]:
        """Return the things of a colour, of a shape, of both, or all."""
        return [thing for thing in self.things if colour in (None, thing.colour) and shape in (None, thing.shape)]

    def alone_in(self, place: str) -> Thing | None:
        """Return the thing in a place, if there is one only and no other may be thought to be there."""
        if None in self.places or self.places.count(place) != 1:
            return None
        return self.things[self.places.index(place)]

    def thousandths(self, box: Box, step: int) -> tuple[int, int, int, int]:
        """Return a box in thousandths of the picture, rounded to `step`."""
        sides = (self.width, self.height, self.width, self.height)
        left, top, right, bottom = (
            min(1000, max(0, round(value / side * 1000 / step) * step)) for value, side in zip(box, sides, strict=True)
        )
        return left, top, right, bottom

    def from_left_to_right(self) -> list[Thing] | None:
        """Return the things in reading order, or None where two are too near to one line to tell."""
        ordered = sorted(self.things, key=lambda thing: thing.x)
        too_near = any(after.x - before.x < 0.07 * self.width for before, after in pairwise(ordered))
        return None if too_near else ordered


def _third(fraction: float) -> int | None:
    if min(abs(fraction - 1 / 3), abs(fraction - 2 / 3)) < PLACE_MARGIN:
        return None
    return min(2, max(0, int(fraction * 3)))


def _circle(radius: float, points: int) -> list[Point]:
    angles = [2 * math.pi * index / points for index in range(points)]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for angle in angles]


def _star() -> list[Point]:
    tips, notches = _circle(1.0, 10)[::2], _circle(0.42, 10)[1::2]
    return [point for pair in zip(tips, notches, strict=True) for point in pair]


def _heart() -> list[Point]:
    points = []
    for index in range(32):
        t = 2 * math.pi * index / 32
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 17, -(y + 2.5) / 17))
    return points


def _cross(arm: float) -> list[Point]:
    far = math.sqrt(1 - arm * arm)
    corner = [(arm, -arm), (arm, -far), (-arm, -far)]
    points: list[Point] = []
    for cos, sin in ((1, 0), (0, -1), (-1, 0), (0, 1)):  # of four quarter turns
        points += [(x * cos - y * sin, x * sin + y * cos) for x, y in corner]
    return points


# Corners of each shape within a circle of radius 1, y downwards.
OUTLINES: dict[str, list[Point]] = {
    "circle": _circle(0.9, 4),
    "ring": _circle(0.9, 4),
    "square": [(-0.72, -0.72), (0.72, -0.72), (0.72, 0.72), (-0.72, 0.72)],
    "triangle": _circle(1.0, 3),
    "diamond": [(0.0, -1.0), (0.78, 0.0), (0.0, 1.0), (-0.78, 0.0)],
    "star": _star(),
    "cross": _cross(0.3),
    "heart": _heart(),
}
RING_HOLE = 0.5  # of the ring's radius
