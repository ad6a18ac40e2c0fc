"""Crowded pictures to learn to see on: up to four small scenes of different sorts side by side.

They say more about shapes, colours and letters per pixel than the pictures that questions are asked about.
"""

from dataclasses import dataclass, replace

from PIL import Image

from examples.nano.world import compose
from examples.nano.world.chance import Rng, between, chance, generator, pick
from examples.nano.world.compose import Canvas
from examples.nano.world.config import WorldConfig
from examples.nano.world.drawing import draw
from examples.nano.world.scene import Box, Scene

_LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2), (2, 2), (2, 2))  # columns, rows
_SIDE_PX = (100, 160)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_MOST_LETTERS = 4
_SHAPES_SHARE, _CHART_SHARE, _DIGITS_SHARE = 0.42, 0.05, 0.6


@dataclass(frozen=True, slots=True)
class Collage:
    """Scenes and where the upper left corner of each is, in pixels."""

    width: int
    height: int
    placed: tuple[tuple[Scene, int, int], ...]

    def draw(self) -> Image.Image:
        """Return the picture, RGB."""
        picture = Image.new("RGB", (self.width, self.height))
        for scene, x, y in self.placed:
            picture.paste(draw(scene), (x, y))
        return picture


def collage(seed: int, index: int, config: WorldConfig) -> Collage:
    """Return collage `index` of seed `seed`, always the same."""
    rng = generator(seed, index, 2)
    columns, rows = pick(rng, _LAYOUTS)
    width, height = round(between(rng, _SIDE_PX)), round(between(rng, _SIDE_PX))
    boxes = [
        (width * column // columns, height * row // rows, width * (column + 1) // columns, height * (row + 1) // rows)
        for row in range(rows)
        for column in range(columns)
    ]
    crowded = _enlarged(config) if len(boxes) > 1 else config
    return Collage(width, height, tuple((_scene(rng, crowded, box), box[0], box[1]) for box in boxes))


def _scene(rng: Rng, config: WorldConfig, box: Box) -> Scene:
    canvas = Canvas(int(box[2] - box[0]), int(box[3] - box[1]), compose.background(rng, config))
    drawn = rng.random()
    if drawn < _SHAPES_SHARE:
        return compose.shapes_scene(rng, config, canvas)
    if drawn < _SHAPES_SHARE + _CHART_SHARE:
        return compose.chart_scene(rng, config, canvas)
    return compose.written_scene(rng, config, canvas, _text(rng))


def _enlarged(config: WorldConfig) -> WorldConfig:
    """Return a world whose things are, on a quarter of the picture, as large as they would be on all of it."""
    (smallest, largest), (lowest, highest) = config.thing_size, config.glyph_height
    return replace(
        config,
        max_things=2,
        thing_size=(2 * smallest, min(0.9, 2 * largest)),
        glyph_height=(min(0.9, 2 * lowest), min(0.95, 2 * highest)),
    )


def _text(rng: Rng) -> str:
    length = 1 + int(rng.integers(_MOST_LETTERS))
    if chance(rng, _DIGITS_SHARE):
        return "".join(str(int(digit)) for digit in rng.integers(0, 10, length))
    text = "".join(pick(rng, _LETTERS) for _ in range(length))
    return pick(rng, (text, text.upper()))
