"""Draws comparisons as bars: medians with their spread, a group of bars for each thing compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from internvl_client.bench import Spread

_WIDTH: Final = 900
_LABELS: Final = 190  # pixels left of the bars
_VALUES: Final = 150  # and right of them
_BAR: Final = 18
_GAP: Final = 14
_TITLE: Final = 40
_COLOURS: Final = ("#1f5fbf", "#c07020", "#2c963c", "#803090")
_INK, _FAINT = "#333333", "#888888"


@dataclass(frozen=True, slots=True)
class Group:
    """Bars that are compared with one another, by the names of the contenders; None where one has no figure."""

    label: str
    bars: Sequence[tuple[str, Spread | None]]


@dataclass(frozen=True, slots=True)
class Panel:
    """Groups of one quantity; `scale` turns figures into `unit`."""

    title: str
    unit: str
    groups: Sequence[Group]
    scale: float = 1.0
    digits: int = 2


def draw(panels: Sequence[Panel], note: str) -> Image.Image:
    """Return the panels below each other. Each group has a scale of its own: its longest bar is as wide as there is."""
    names = list(dict.fromkeys(name for panel in panels for group in panel.groups for name, _ in group.bars))
    height = _TITLE + sum(_height(panel) for panel in panels) + _TITLE
    picture = Image.new("RGB", (_WIDTH, height), "white")
    pen = ImageDraw.Draw(picture)
    for index, name in enumerate(names):
        pen.text((_LABELS + 180 * index, 14), name, fill=_colour(names, name), font=_face(15))
    top = _TITLE
    for panel in panels:
        _draw_panel(pen, panel, names, top)
        top += _height(panel)
    pen.text((_GAP, top + 12), note, fill=_FAINT, font=_face(12))
    return picture


def _height(panel: Panel) -> int:
    return _TITLE + sum(_BAR * len(group.bars) + _GAP for group in panel.groups)


def _draw_panel(pen: ImageDraw.ImageDraw, panel: Panel, names: Sequence[str], top: int) -> None:
    pen.text((_GAP, top + 10), f"{panel.title} ({panel.unit})", fill=_INK, font=_face(16))
    top += _TITLE
    for group in panel.groups:
        pen.text((_LABELS - 10, top + _BAR * len(group.bars) / 2), group.label, fill=_INK, font=_face(14), anchor="rm")
        longest = max((spread.most for _, spread in group.bars if spread), default=0.0) or 1.0
        for name, spread in group.bars:
            if spread:
                _draw_bar(pen, spread, longest, _colour(names, name), top)
                text = spread.text(panel.scale, panel.digits)
                pen.text((_WIDTH - _VALUES + 8, top + _BAR / 2), text, fill=_INK, font=_face(12), anchor="lm")
            top += _BAR
        top += _GAP


def _draw_bar(pen: ImageDraw.ImageDraw, spread: Spread, longest: float, colour: str, top: int) -> None:
    def x(value: float) -> float:
        return _LABELS + (_WIDTH - _LABELS - _VALUES) * value / longest

    pen.rectangle((_LABELS, top + 2, x(spread.median), top + _BAR - 2), fill=colour)
    middle = top + _BAR / 2
    pen.line((x(spread.least), middle, x(spread.most), middle), fill=_INK)
    for end in (spread.least, spread.most):
        pen.line((x(end), middle - 4, x(end), middle + 4), fill=_INK)


def _colour(names: Sequence[str], name: str) -> str:
    return _COLOURS[names.index(name) % len(_COLOURS)]


def _face(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
