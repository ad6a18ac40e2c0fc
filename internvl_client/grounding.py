"""Boxes in answers: read from `<ref>..</ref><box>[[..]]</box>`, in pixels of the original picture, and drawn on it.

Ask with `grounding=True`, so that the tags reach the client for every family of models.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

if TYPE_CHECKING:
    from PIL import Image as PillowImage
    from PIL import ImageDraw, ImageFont

    Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

Orientation = Literal["card", "viewer"]

_NUMBER: Final = r"\s*(-?\d{1,9}(?:\.\d{1,9})?)\s*"  # more digits would be no single-precision number
_NAME_END: Final = "</ref>"
# The beginning of a name, the end of a run of boxes, or four numbers in brackets.
_TOKEN: Final = re.compile(rf"(?P<name><ref>)|(?P<end></box>)|\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_SCALE: Final = 1000.0
_COLOURS: Final = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")


@dataclass(frozen=True, slots=True)
class Box:
    """A box in pixels of the original picture, from its upper left corner. `label` is empty where none was given."""

    left: float
    top: float
    right: float
    bottom: float
    label: str = ""


def parse_boxes(text: str, width: int, height: int) -> list[Box]:
    """Return the boxes in an answer about a picture of `width` x `height` pixels, in order.

    Models write thousandths of the picture's sides; four numbers whose sum is below 4 are fractions. Computed in single
    precision, as the models' own evaluation does. The tags may be missing: four numbers in brackets are a box.
    """
    return list(_boxes(text, width, height))


def draw_boxes(
    picture: bytes, boxes: Iterable[Box], *, line_width: int | None = None, orientation: Orientation = "card"
) -> bytes:
    """Return a PNG of the encoded `picture` with `boxes` and their labels drawn on it.

    `orientation` is how the server sees pictures: as stored ("card") or turned as EXIF says ("viewer"). Needs Pillow.
    Raises `ValueError` when the bytes are no picture.
    """
    from PIL import ImageDraw, ImageFont

    canvas = open_picture(picture, orientation).convert("RGB")
    draw = ImageDraw.Draw(canvas)
    stroke = line_width or max(2, round(min(canvas.size) / 200))
    font = ImageFont.load_default(14)
    labels: dict[str, str] = {}
    for box in boxes:
        colour = labels.setdefault(box.label, _COLOURS[len(labels) % len(_COLOURS)])
        corners = _corners(box, canvas.size)
        draw.rectangle(corners, outline=colour, width=stroke)
        if box.label:
            _write_label(draw, box.label, font, (corners[0], corners[1]), colour)
    buffer = BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()


def open_picture(picture: bytes, orientation: Orientation) -> PillowImage.Image:
    """Return the decoded `picture`. Needs Pillow; raises `ValueError` when the bytes are no picture."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        opened: PillowImage.Image = Image.open(BytesIO(picture))
        opened.load()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError):
        raise ValueError("The bytes are no picture that can be read.") from None
    return ImageOps.exif_transpose(opened) if orientation == "viewer" else opened


def picture_size(picture: bytes, *, orientation: Orientation = "card") -> tuple[int, int]:
    """Return width and height of the encoded `picture`. Needs Pillow; raises `ValueError` when it is no picture."""
    return open_picture(picture, orientation).size


def _boxes(text: str, width: int, height: int) -> Iterator[Box]:
    label, position = "", 0
    last_name_end = text.rfind(_NAME_END)  # beyond it no search for another: a model may repeat `<ref>` for ever
    while token := _TOKEN.search(text, position):
        position = token.end()
        if token["name"] and position <= last_name_end:
            name_end = text.index(_NAME_END, position)
            label, position = text[position:name_end].strip(), name_end + len(_NAME_END)
        elif token["end"]:
            label = ""
        elif not token["name"]:
            yield _box([float(number) for number in token.groups()[2:]], width, height, label)


def _box(numbers: Sequence[float], width: int, height: int, label: str) -> Box:
    divisor = 1.0 if sum(numbers) < 4 else _SCALE
    sides = (width, height, width, height)
    left, top, right, bottom = (
        _single(_single(_single(number) / divisor) * side) for number, side in zip(numbers, sides, strict=True)
    )
    return Box(left, top, right, bottom, label)


def _single(value: float) -> float:
    """Return `value` rounded to single precision."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def _corners(box: Box, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the box inside of the picture, its corners in order whatever the model wrote."""
    columns, rows = sorted((box.left, box.right)), sorted((box.top, box.bottom))
    left, right = (min(max(value, 0.0), size[0] - 1.0) for value in columns)
    top, bottom = (min(max(value, 0.0), size[1] - 1.0) for value in rows)
    return left, top, right, bottom


def _write_label(draw: ImageDraw.ImageDraw, label: str, font: Font, corner: tuple[float, float], colour: str) -> None:
    # Pillow's own font may lack the script of a label; a box with a wrong label is better than none.
    _, _, right, bottom = draw.textbbox((0, 0), label, font=font)
    left, top = corner[0], max(0.0, corner[1] - bottom - 2)
    draw.rectangle((left, top, left + right + 4, top + bottom + 2), fill=colour)
    draw.text((left + 2, top), label, fill="white", font=font)
