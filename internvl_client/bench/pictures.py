"""Draws pictures that nobody has seen: coloured squares, as PNG. The same seed draws the same bytes everywhere."""

import random
import struct
import zlib
from typing import Final

_SQUARE: Final = 8  # pixels; small enough that no two tiles are alike
_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_RGB_8_BIT: Final = (8, 2, 0, 0, 0)


def draw_picture(width: int, height: int, seed: str) -> bytes:
    """Return a picture of `width` x `height` pixels."""
    colours = random.Random(seed)  # noqa: S311  nothing is secret here
    columns = -(-width // _SQUARE)
    rows = []
    for top in range(0, height, _SQUARE):
        row = _pixel_row(colours.randbytes(3 * columns), width)
        rows += [row] * min(_SQUARE, height - top)
    header = struct.pack(">IIBBBBB", width, height, *_RGB_8_BIT)
    pixels = zlib.compress(b"".join(rows), level=1)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _pixel_row(colours: bytes, width: int) -> bytes:
    """Return a row of pixels behind its filter byte, which says that there is none."""
    squares = (colours[start : start + 3] * _SQUARE for start in range(0, len(colours), 3))
    return b"\0" + b"".join(squares)[: 3 * width]


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
