"""Decodes untrusted pictures and cuts them into tiles; under the policy "card" bit for bit as the cards' code does."""

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import Final

import numpy as np
import numpy.typing as npt

# Imported by name: otherwise Pillow would load the plug-ins of all its formats at the first picture.
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from shared.embedding import VideoFrame
from shared.errors import MediaTooLarge, MediaUnreadable
from vision_service.preprocess.tiling import Grid, Policy, TilingSpec, choose_grid

Tiles = npt.NDArray[np.uint8]

FORMATS: Final = tuple(
    plugin.format
    for plugin in (
        JpegImagePlugin.JpegImageFile,
        PngImagePlugin.PngImageFile,
        WebPImagePlugin.WebPImageFile,
        GifImagePlugin.GifImageFile,
        BmpImagePlugin.BmpImageFile,
        TiffImagePlugin.TiffImageFile,
    )
)
_MEAN: Final = np.array((0.485, 0.456, 0.406), np.float32)
_STD: Final = np.array((0.229, 0.224, 0.225), np.float32)

# What Pillow's decoders raise on damaged files, besides its own errors (which are OSErrors).
DECODER_ERRORS: Final = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
)
BOMB_ERRORS: Final = (Image.DecompressionBombError, Image.DecompressionBombWarning)

# What turns a picture upright, by its EXIF orientation.
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A picture, or the frames of a video, ready for the vision tower.

    Width and height in pixels; the tiles [n, S, S, 3] go through the grid row by row, the thumbnail comes last. Those
    of a video do so frame after frame, every frame with the same grid.
    """

    width: int
    height: int
    grid: Grid
    tiles: Tiles
    frames: tuple[VideoFrame, ...] = ()


def preprocess(content: bytes, spec: TilingSpec, max_pixels: int) -> Picture:
    """Return the picture that `content` holds, cut as `spec` says.

    Raises `MediaTooLarge` before decoding when the header tells of more than `max_pixels`, and where memory ends;
    `MediaUnreadable` when the bytes are no whole picture of an accepted format. Safe in any thread.
    """
    image = read_rgb(content, max_pixels, spec.policy)
    grid = choose_grid(image.width, image.height, spec)
    return Picture(image.width, image.height, grid, cut_tiles(image, grid, spec))


def read_rgb(content: bytes, max_pixels: int, policy: Policy = "card") -> Image.Image:
    """Return the decoded picture (of an animation: its first frame) in RGB; raises as `preprocess` does."""
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            # Only the header has been read. The size is checked here and not by Pillow's process-wide limit.
            if pixels_to_decode(image) > max_pixels:
                raise too_many_pixels(max_pixels)
            image.load()
            return _converted(image) if policy == "card" else _as_viewed(image)
    except BOMB_ERRORS:
        raise too_many_pixels(max_pixels) from None
    except MemoryError as error:
        raise MediaTooLarge("Decoding the picture takes more memory than is allowed.") from error
    except DECODER_ERRORS as error:
        raise unreadable() from error


def cut_tiles(image: Image.Image, grid: Grid, spec: TilingSpec) -> Tiles:
    """Return the tiles [n, S, S, 3] of an RGB picture: it is stretched to the grid, its proportions are not kept."""
    size, with_thumbnail = spec.tile_size, spec.thumbnail and grid.tile_count > 1
    tiles: Tiles = np.empty((grid.tile_count + with_thumbnail, size, size, 3), np.uint8)
    if with_thumbnail:
        image.load()  # by one thread; resizing releases the interpreter's lock
        with ThreadPoolExecutor(1) as other_thread:
            thumbnail = other_thread.submit(_resized, image, size, size)
            _cut(_resized(image, size * grid.columns, size * grid.rows), grid, tiles[:-1])
            tiles[-1] = thumbnail.result()
    else:
        _cut(_resized(image, size * grid.columns, size * grid.rows), grid, tiles)
    return tiles


def pixel_levels() -> npt.NDArray[np.float32]:
    """Return the model's input value of every channel and byte, [3, 256]."""
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    return (levels - _MEAN[:, np.newaxis]) / _STD[:, np.newaxis]


def pixels_to_decode(image: ImageFile.ImageFile) -> int:
    """Return how many pixels a picture that was opened, and not decoded, will have in memory."""
    pixels = image.width * image.height
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # Decoded tile by tile, and a tile may be far larger than the picture it is for.
        tags = image.tag_v2
        pixels = max(pixels, tags.get(TiffImagePlugin.TILEWIDTH, 1) * tags.get(TiffImagePlugin.TILELENGTH, 1))
    return pixels


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """Return what turns the picture upright, None where nothing has to. Of a PNG that was not decoded, unknown."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except DECODER_ERRORS:
        return None  # metadata that cannot be read turns nothing, as in other viewers
    return _TURNS.get(orientation) if isinstance(orientation, int) else None


def too_many_pixels(max_pixels: int) -> MediaTooLarge:
    """Return the error for a picture of more pixels than `max_pixels`."""
    return MediaTooLarge(f"A picture may have at most {max_pixels} pixels.")


def unreadable() -> MediaUnreadable:
    """Return the error for what no decoder takes."""
    return MediaUnreadable(
        "The bytes are no picture of an accepted format (JPEG, PNG, WebP, GIF, BMP, TIFF), or are damaged."
    )


def _as_viewed(image: Image.Image) -> Image.Image:
    """Return what a person sees: upright, transparency over white, all 16 bits of a grey counted."""
    turn = turn_of(image)
    upright = image if turn is None else image.transpose(turn)
    if upright.mode.startswith("I;16"):
        levels = np.asarray(upright).astype(np.uint32)
        upright = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    layer = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _converted(image: Image.Image) -> Image.Image:
    # What is RGB already would only be copied: 48 MB of a picture of 12 million pixels.
    return image if image.mode == "RGB" else image.convert("RGB")


def _cut(stretched: Tiles, grid: Grid, tiles: Tiles) -> None:
    """Fill `tiles` with the pieces of a picture that has the size of the grid, row by row."""
    size = tiles.shape[1]
    pieces = stretched.reshape(grid.rows, size, grid.columns, size, 3).swapaxes(1, 2)
    tiles.reshape(grid.rows, grid.columns, size, size, 3)[:] = pieces


def _resized(image: Image.Image, width: int, height: int) -> Tiles:
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
