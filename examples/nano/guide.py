"""What each patch of a picture shows, known exactly because the picture was drawn, and a loss for not seeing it.

Answers alone say little about where a model should look. In training a guide therefore reads the visual tokens, through
one linear layer that is thrown away afterwards, and asks of each patch: what shape, colour or letter is here, which
letter of the text is it, is this the middle of something, and where does it end. Ends are asked for twice: as numbers,
and as places on a ruler, because an answer spells a box in digits and a decoder finds those from places far sooner.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional

from examples.nano.world import Collage, Scene
from examples.nano.world.fonts import font
from examples.nano.world.scene import Box, Writing
from examples.nano.world.vocabulary import COLOURS, SHAPES
from vision_service.preprocess.tiling import Grid, TilingSpec

_SHAPES: Final = (*SHAPES, "bar")
_COLOURS: Final = tuple(COLOURS)
_LETTERS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"
_MOST_LETTERS: Final = 8
# What is said of each patch, and in how many ways; 0 means that nothing is there.
CLASSES: Final = (1 + len(_SHAPES), 1 + len(_COLOURS), 1 + len(_LETTERS), 1 + _MOST_LETTERS, 2)
_COLOUR, _PLACE, _MIDDLE = 1, 3, 4
UNKNOWN: Final = -1
_WHOLE: Final = (0.0, 0.0, 1.0, 1.0)
_POINTS: Final = (1 / 6, 1 / 2, 5 / 6)  # of a patch, both ways
# Where nothing of a kind is there counts less: it is most of every picture.
_EMPTY_WEIGHT, _BOX_WEIGHT = 0.1, 4.0
_RULER_STEPS: Final = 20

Labels = npt.NDArray[np.int64]
Boxes = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Part:
    """Something with an outline: a thing, a bar, or one letter of a text."""

    labels: tuple[int, int, int, int]
    box: Box
    outline: tuple[tuple[float, float], ...] | None = None
    is_round: bool = False

    def moved(self, x: float, y: float) -> "_Part":
        """Return the same further right and down."""
        left, top, right, bottom = self.box
        outline = self.outline and tuple((px + x, py + y) for px, py in self.outline)
        return replace(self, box=(left + x, top + y, right + x, bottom + y), outline=outline)


@dataclass(frozen=True)
class _Seen:
    """A picture of known parts. Sizes in pixels."""

    width: int
    height: int
    parts: list[_Part]

    def by(self, view: Box, patches: int) -> tuple[Labels, Boxes]:
        """Return labels [patches², fields] and boxes [patches², 4] of a view, in fractions of the picture."""
        numbers = _numbers_of_patches(self._covered, view, patches)
        labels = np.zeros((patches, patches, len(CLASSES)), np.int64)
        labels[..., :_MIDDLE] = np.array([(0, 0, 0, 0), *(part.labels for part in self.parts)], np.int64)[numbers]
        ends = np.array([(0, 0, 0, 0), *(self._within(part.box, view) for part in self.parts)], np.float32)
        for left, top, right, bottom in ends[1:]:
            column, row = int((left + right) / 2 * patches // 1), int((top + bottom) / 2 * patches // 1)
            if 0 <= column < patches and 0 <= row < patches:
                labels[row, column, _MIDDLE] = 1
        return labels.reshape(-1, len(CLASSES)), np.clip(ends, 0, 1)[numbers].reshape(-1, 4)

    @cached_property
    def _covered(self) -> npt.NDArray[np.uint8]:
        """For each pixel which part is there, counted from 1; 0 is the background."""
        picture = Image.new("L", (self.width, self.height))
        pen = ImageDraw.Draw(picture)
        for number, part in enumerate(self.parts, start=1):
            if part.is_round:
                pen.ellipse(part.box, fill=number)
            elif part.outline:
                pen.polygon(part.outline, fill=number)
            else:
                pen.rectangle(part.box, fill=number)
        return np.asarray(picture)

    def _within(self, box: Box, view: Box) -> Box:
        """Return a box in fractions of a view."""
        left, top, right, bottom = view
        across, down = (right - left) * self.width, (bottom - top) * self.height
        x, y = left * self.width, top * self.height
        return (box[0] - x) / across, (box[1] - y) / down, (box[2] - x) / across, (box[3] - y) / down


def what_is_seen(scene: Scene, grid: Grid, spec: TilingSpec, patches: int) -> tuple[Labels, Boxes]:
    """Return labels [tiles, patches², len(CLASSES)] and boxes [tiles, patches², 4] of a picture's tiles, row by row.

    Boxes are fractions of the tile, cut off at its sides. Where a tile does not show the whole picture, which letter of
    the text it shows is `UNKNOWN`.
    """
    seen = _Seen(scene.width, scene.height, list(_parts(scene)))
    found = [seen.by(view, patches) for view in _views(grid, spec)]
    for labels, _ in found[:-1]:
        labels[..., _PLACE] = np.where(labels[..., _PLACE] > 0, UNKNOWN, 0)
    return np.stack([labels for labels, _ in found]), np.stack([boxes for _, boxes in found])


def what_a_collage_shows(collage: Collage, patches: int) -> tuple[Labels, Boxes]:
    """Return labels and boxes of a collage that is one tile, as `what_is_seen` does."""
    parts = [part.moved(x, y) for scene, x, y in collage.placed for part in _parts(scene)]
    labels, boxes = _Seen(collage.width, collage.height, parts).by(_WHOLE, patches)
    return labels[None], boxes[None]


class Guide(nn.Module):
    """Reads patches from visual tokens. Used in training only."""

    def __init__(self, hidden_size: int, shuffle_factor: int) -> None:
        super().__init__()
        self._factor = shuffle_factor
        self.read = nn.Linear(hidden_size, shuffle_factor**2 * (sum(CLASSES) + 4))
        self.ruler = nn.Linear(hidden_size, shuffle_factor**2 * 4 * (_RULER_STEPS + 1))
        for linear in (self.read, self.ruler):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, visual_tokens: torch.Tensor, labels: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Return the loss of visual tokens [tiles * tokens, hidden] against what `what_is_seen` says of the tiles."""
        cells = self._factor**2
        tokens = functional.rms_norm(visual_tokens.float(), visual_tokens.shape[-1:])
        said = self.read(tokens).view(len(tokens) * cells, -1).float().split((*CLASSES, 4), dim=-1)
        known = self._by_token(labels)
        shown = known[:, _COLOUR] > 0
        loss = torch.zeros((), device=tokens.device)
        for field in range(len(CLASSES)):
            weights = torch.where(known[:, field] > 0, 1.0, _EMPTY_WEIGHT)
            each = functional.cross_entropy(said[field], known[:, field], reduction="none", ignore_index=UNKNOWN)
            loss = loss + (each * weights).sum() / weights.sum()
        ends = self._by_token(boxes)
        on_ruler = self.ruler(tokens).view(len(ends), 4, -1).float()
        distances = _BOX_WEIGHT * (said[-1] - ends).abs() + _ruler_loss(on_ruler, ends)
        return loss + (distances.mean(dim=-1) * shown).sum() / shown.sum().clamp(min=1)

    def _by_token(self, of_patches: torch.Tensor) -> torch.Tensor:
        """Return [tiles * patches, fields] in the order in which tokens merge patches."""
        tiles, count, fields = of_patches.shape
        side = round(count**0.5) // self._factor
        cells = of_patches.view(tiles, side, self._factor, side, self._factor, fields)
        return cells.transpose(2, 3).reshape(-1, fields)


def _ruler_loss(said: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Return how far logits over the marks of a ruler [..., marks] are from `ends` [...], in 0 to 1.

    An end between two marks is partly at each of them; the loss is zero where exactly that is said.
    """
    place = ends * _RULER_STEPS
    mark = place.floor().clamp(max=_RULER_STEPS - 1)
    after = place - mark
    parts = torch.stack((1 - after, after), dim=-1)
    marks = torch.stack((mark, mark + 1), dim=-1).long()
    likely = functional.log_softmax(said, dim=-1).gather(-1, marks)
    return (torch.special.xlogy(parts, parts) - parts * likely).sum(dim=-1)


def _parts(scene: Scene) -> Iterator[_Part]:
    for thing in scene.things:
        labels = (1 + _SHAPES.index(thing.shape), 1 + _COLOURS.index(thing.colour), 0, 0)
        yield _Part(labels, thing.box, tuple(thing.outline()), thing.shape in ("circle", "ring"))
    for bar in scene.bars:
        yield _Part((len(_SHAPES), 1 + _COLOURS.index(bar.colour), 0, 0), bar.box)
    if scene.writing:
        yield from _letters(scene.writing)


def _letters(writing: Writing) -> Iterator[_Part]:
    face = font(writing.face, writing.size_px)
    _, top, _, bottom = writing.box
    for index, letter in enumerate(writing.text.lower()):
        left, right = (writing.x + face.getlength(writing.text[:end]) for end in (index, index + 1))
        place = min(_MOST_LETTERS, 1 + index)
        labels = (0, 1 + _COLOURS.index(writing.colour), 1 + _LETTERS.index(letter), place)
        yield _Part(labels, (left, top, right, bottom))


def _views(grid: Grid, spec: TilingSpec) -> Iterator[Box]:
    """Yield what each tile shows, in fractions of the picture."""
    for row in range(grid.rows):
        for column in range(grid.columns):
            yield column / grid.columns, row / grid.rows, (column + 1) / grid.columns, (row + 1) / grid.rows
    if spec.thumbnail and grid.tile_count > 1:
        yield _WHOLE


def _numbers_of_patches(covered: npt.NDArray[np.uint8], view: Box, patches: int) -> npt.NDArray[np.uint8]:
    """Return the part that each patch shows, [patches, patches]; the one drawn last where there are several."""
    steps = np.add.outer(np.arange(patches), _POINTS).ravel() / patches
    height, width = covered.shape
    left, top, right, bottom = view
    xs = np.minimum(width - 1, ((left + (right - left) * steps) * width).astype(int))
    ys = np.minimum(height - 1, ((top + (bottom - top) * steps) * height).astype(int))
    points = covered[np.ix_(ys, xs)].reshape(patches, len(_POINTS), patches, len(_POINTS))
    found: npt.NDArray[np.uint8] = points.max(axis=(1, 3))
    return found
