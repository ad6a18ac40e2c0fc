"""Draws the tiles that a picture is cut into over the picture itself."""

from __future__ import annotations

from io import BytesIO
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from internvl_client.grounding import Orientation, open_picture
from internvl_client.types import Estimate

if TYPE_CHECKING:
    from PIL import Image as PillowImage

_LINE: Final = "#e6194b"
_EDGE: Final = "white"


def draw_tiles(picture: bytes, found: Estimate) -> bytes:
    """Return a PNG of the encoded `picture` with the grid that the server cuts it into, tiles numbered in their order.

    A tile is a square where the model sees it: the picture is resized to the grid, whatever its shape. Needs Pillow;
    raises `ValueError` when the bytes are no picture.
    """
    from PIL import ImageDraw, ImageFont

    canvas = open_picture(picture, orientation_of(picture, found)).convert("RGB")
    draw = ImageDraw.Draw(canvas)
    stroke = max(2, round(min(canvas.size) / 200))
    for box in _grid(canvas, found):
        draw.rectangle(box, outline=_EDGE, width=stroke + 2)
        draw.rectangle(box, outline=_LINE, width=stroke)
    font = ImageFont.load_default(max(12, round(min(canvas.size) / 20)))
    for number, (left, top, _, _) in enumerate(_grid(canvas, found), start=1):
        draw.text((left + 2 * stroke, top + 2 * stroke), str(number), _LINE, font, stroke_width=2, stroke_fill=_EDGE)
    buffer = BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()


def orientation_of(picture: bytes, found: Estimate) -> Orientation:
    """Return how the server sees a picture: as it is stored, unless its sides are those of the picture turned."""
    return "card" if open_picture(picture, "card").size == (found.width, found.height) else "viewer"


def _grid(canvas: PillowImage.Image, found: Estimate) -> list[tuple[int, int, int, int]]:
    """Return the tiles' boxes in pixels of the picture, row by row."""
    columns = [round(canvas.width * index / found.columns) for index in range(found.columns + 1)]
    rows = [round(canvas.height * index / found.rows) for index in range(found.rows + 1)]
    return [
        (left, top, max(left, right - 1), max(top, bottom - 1))
        for top, bottom in pairwise(rows)
        for left, right in pairwise(columns)
    ]
