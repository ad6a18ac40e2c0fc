"""Pictures in a terminal: two pixels to a character, the upper one its colour, the lower one the colour behind it."""

from importlib.util import find_spec
from typing import Final

from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

from internvl_client.grounding import Orientation, open_picture

_UPPER_HALF: Final = "\u2580"
_MAX_COLUMNS, _MAX_ROWS = 64, 20


def can_show_pictures(console: Console) -> bool:
    """Return whether the terminal has the colours and characters, and Pillow is here."""
    has_colours = console.is_terminal and not console.is_dumb_terminal and bool(console.color_system)
    speaks_unicode = (console.encoding or "").lower().startswith("utf")
    return has_colours and not console.no_color and speaks_unicode and find_spec("PIL") is not None


def show_picture(console: Console, content: bytes, *, orientation: Orientation = "card") -> None:
    """Print the encoded picture, as large as there is room; raise `ValueError` when it is none."""
    for line in picture_lines(content, min(console.width, _MAX_COLUMNS), _MAX_ROWS, orientation=orientation):
        console.print(line, crop=False)


def picture_lines(content: bytes, columns: int, rows: int, *, orientation: Orientation = "card") -> list[Text]:
    """Return the encoded picture as lines of at most `columns` characters; transparent parts are white.

    Needs Pillow; raises `ValueError` when the bytes are no picture.
    """
    from PIL import Image

    picture = open_picture(content, orientation).convert("RGBA")
    scale = min(columns / picture.width, 2 * rows / picture.height, 1.0)
    width, pairs = max(1, round(picture.width * scale)), max(1, round(picture.height * scale / 2))
    small = picture.resize((width, 2 * pairs), Image.Resampling.BOX)
    canvas = Image.new("RGBA", small.size, "white")
    canvas.alpha_composite(small)
    pixels = canvas.convert("RGB").tobytes()
    return [_line(pixels[2 * 3 * width * row : 2 * 3 * width * (row + 1)], width) for row in range(pairs)]


def _line(pixels: bytes, width: int) -> Text:
    """Return a line from two rows of pixels, three bytes each."""
    line = Text(no_wrap=True)
    for start in range(0, 3 * width, 3):
        upper, lower = pixels[start : start + 3], pixels[3 * width + start : 3 * width + start + 3]
        line.append(_UPPER_HALF, Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower)))
    return line
