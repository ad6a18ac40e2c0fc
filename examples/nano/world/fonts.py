"""The fonts that writing is drawn in: two from packages under the SIL Open Font License, one from Pillow itself."""

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from PIL import ImageFont

from examples.nano.world.scene import Box

_FILES: Final = {
    "lato": ("font_lato", "Lato-Regular.ttf"),
    "lato-bold": ("font_lato", "Lato-Bold.ttf"),
    "serif": ("font_source_serif_pro", "SourceSerifPro-Regular.ttf"),
    "serif-bold": ("font_source_serif_pro", "SourceSerifPro-Bold.ttf"),
}
FACES: Final = (*_FILES, "aileron")


class FontsMissing(Exception):
    """A package of fonts is not installed."""


@lru_cache(maxsize=512)
def font(face: str, size_px: int) -> ImageFont.FreeTypeFont:
    """Return a face at a size, or raise `FontsMissing`."""
    if face not in _FILES:
        plain = ImageFont.load_default(size_px)
        assert isinstance(plain, ImageFont.FreeTypeFont)
        return plain
    return ImageFont.truetype(str(_path(face)), size_px, layout_engine=ImageFont.Layout.BASIC)


def ink_box(text: str, face: str, size_px: int) -> Box:
    """Return the box of the ink of a text that is drawn at (0, 0), in pixels."""
    mask, (x, y) = font(face, size_px).getmask2(text, "L", anchor="la")
    left, top, right, bottom = mask.getbbox() or (0, 0, 0, 0)
    return float(left + x), float(top + y), float(right + x), float(bottom + y)


def _path(face: str) -> Path:
    package, name = _FILES[face]
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise FontsMissing(f"pip install {package.replace('_', '-')}")
    return Path(spec.origin).parent / "files" / name
