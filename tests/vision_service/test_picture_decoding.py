"""Whatever bytes come, preprocessing returns tiles or one of two errors in our own words."""

import re
import struct
import zlib
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from shared.errors import MediaTooLarge, MediaUnreadable, ServiceError
from vision_service.preprocess.image import preprocess, read_rgb
from vision_service.preprocess.tiling import Grid, TilingSpec

IMAGES = Path(__file__).parents[1] / "golden/images"
SPEC = TilingSpec(28, 1, 12, thumbnail=True)
MAX_PIXELS = 1_000_000
# What no message to a client may hold: addresses, paths, Python's and Pillow's own words.
LIBRARY_WORDS = re.compile(r"0x[0-9a-f]{4,}|/|Traceback|BytesIO|identify|truncated|Image file")


def picture_bytes(width: int, height: int, image_format: str = "PNG") -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (width, height), (10, 200, 30)).save(buffer, image_format)
    return buffer.getvalue()


def error_of(content: bytes, max_pixels: int = MAX_PIXELS) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        preprocess(content, SPEC, max_pixels)
    assert not LIBRARY_WORDS.search(caught.value.message)
    return caught.value


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7\n", b"\xff\xd8\xff"]
)
def test_what_is_no_picture_is_unreadable(content: bytes) -> None:
    assert isinstance(error_of(content), MediaUnreadable)


@pytest.mark.parametrize("image_format", ["PPM", "TGA", "ICO", "PDF", "EPS"])
def test_other_formats_of_pillow_are_refused(image_format: str) -> None:
    assert isinstance(error_of(picture_bytes(8, 8, image_format)), MediaUnreadable)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_a_picture_cut_short_is_unreadable(image_format: str) -> None:
    content = picture_bytes(200, 200, image_format)
    assert isinstance(error_of(content[: len(content) // 2]), MediaUnreadable)


def test_too_many_pixels_are_refused_before_decoding() -> None:
    content = picture_bytes(2000, 2000)
    # The pixels are missing: had they been looked at, the picture would be unreadable.
    assert isinstance(error_of(content[:60]), MediaTooLarge)
    assert isinstance(error_of(content, max_pixels=3_999_999), MediaTooLarge)
    assert preprocess(content, SPEC, 4_000_000).width == 2000


def test_a_header_of_more_pixels_than_pillow_allows_is_too_large() -> None:
    header = bytearray(picture_bytes(8, 8, "BMP")[:54])
    header[18:26] = (60_000).to_bytes(4, "little") * 2
    assert isinstance(error_of(bytes(header)), MediaTooLarge)


def tiled_tiff(width: int, height: int, tile_side: int) -> bytes:
    """Return a grey, deflated TIFF of one tile."""
    tile = zlib.compress(bytes(tile_side * tile_side))
    values = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile_side, 323: tile_side}
    start = 8 + 2 + 12 * (len(values) + 2) + 4
    values |= {324: start, 325: len(tile)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + bytes(4) + tile


def test_a_tiff_of_few_pixels_in_a_huge_tile_is_too_large() -> None:
    assert preprocess(tiled_tiff(8, 8, 16), SPEC, MAX_PIXELS).width == 8
    assert isinstance(error_of(tiled_tiff(8, 8, 2000)), MediaTooLarge)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 7), (7, 1), (1, 65_500), (65_500, 1)])
def test_slivers_and_dots_are_pictures(width: int, height: int) -> None:
    picture = preprocess(picture_bytes(width, height), SPEC, MAX_PIXELS)
    assert (picture.width, picture.height) == (width, height)
    assert picture.tiles.shape[1:] == (28, 28, 3)


def test_the_first_frame_stands_for_an_animation() -> None:
    picture = preprocess((IMAGES / "animated.gif").read_bytes(), SPEC, MAX_PIXELS)
    assert picture.grid == Grid(3, 2)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damaged_pictures_raise_nothing_but_our_errors(data: st.DataObject) -> None:
    content = bytearray(
        (IMAGES / data.draw(st.sampled_from(sorted(path.name for path in IMAGES.iterdir())))).read_bytes()
    )
    for position in data.draw(st.lists(st.integers(0, min(len(content), 400) - 1), max_size=8)):
        content[position] = data.draw(st.integers(0, 255))
    spec = replace(SPEC, policy=data.draw(st.sampled_from(["card", "viewer"])))
    with suppress(MediaUnreadable, MediaTooLarge):
        preprocess(bytes(content[: data.draw(st.integers(1, len(content)))]), spec, MAX_PIXELS)


def viewed(content: bytes) -> Image.Image:
    return read_rgb(content, MAX_PIXELS, "viewer")


def saved(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["exif_orientation3.jpg", "exif_orientation6.jpg"])
def test_a_viewer_sees_a_turned_picture_upright_and_the_card_does_not(name: str) -> None:
    content = (IMAGES / name).read_bytes()
    with Image.open(BytesIO(content)) as image:
        as_stored, upright = image.convert("RGB"), ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(read_rgb(content, MAX_PIXELS), as_stored)
    assert np.array_equal(viewed(content), upright)
    assert as_stored.size != upright.size or not np.array_equal(as_stored, upright)


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_orientations_are_turned_once(orientation: int, image_format: str) -> None:
    # Red lies at the upper left of what is seen, green at the upper right; the file holds it turned.
    seen = np.zeros((20, 30, 3), np.uint8)
    seen[:10, :15, 0] = seen[:10, 15:, 1] = 255
    stored = {
        1: seen, 2: np.fliplr(seen), 3: np.rot90(seen, 2), 4: np.flipud(seen), 5: seen.swapaxes(0, 1),
        6: np.rot90(seen, 1), 7: np.rot90(seen.swapaxes(0, 1), 2), 8: np.rot90(seen, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"lossless": True} if image_format == "WEBP" else {}
    content = saved(Image.fromarray(np.ascontiguousarray(stored)), image_format, exif=exif, **options)
    assert np.array_equal(viewed(content), seen)


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = Image.new("RGB", (6, 4), "red")
    assert np.array_equal(viewed(saved(image, exif=exif)), image)


def test_a_viewer_sees_transparency_over_white_and_the_card_sees_what_is_beneath() -> None:
    content = (IMAGES / "rgba_gradient_alpha.png").read_bytes()
    with Image.open(BytesIO(content)) as image:
        levels = np.asarray(image.convert("RGBA")).astype(float)
    color, alpha = levels[..., :3], levels[..., 3:] / 255
    expected = color * alpha + 255 * (1 - alpha)
    assert np.abs(np.asarray(viewed(content)) - expected).max() <= 1
    assert np.array_equal(read_rgb(content, MAX_PIXELS), color)


@pytest.mark.parametrize("name", ["gray_LA.png", "palette_P_transparent.png", "lossless_alpha.webp"])
def test_every_form_of_transparency_lies_over_white(name: str) -> None:
    content = (IMAGES / name).read_bytes()
    with Image.open(BytesIO(content)) as image:
        layer = image.convert("RGBA")
    over_white = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    assert np.array_equal(viewed(content), over_white)
    assert not np.array_equal(viewed(content), read_rgb(content, MAX_PIXELS))


def test_a_viewer_sees_all_levels_of_sixteen_bits_and_the_card_clips_them() -> None:
    levels = np.array([[0, 128, 256, 40_000, 65_535]], np.uint16)
    content = saved(Image.fromarray(levels))
    assert np.asarray(viewed(content))[0, :, 0].tolist() == [0, 0, 1, 156, 255]
    assert np.asarray(read_rgb(content, MAX_PIXELS))[0, :, 0].tolist() == [0, 128, 255, 255, 255]
    golden = (IMAGES / "gray16.png").read_bytes()
    assert not np.array_equal(viewed(golden), read_rgb(golden, MAX_PIXELS))


@pytest.mark.parametrize("name", ["rgb_landscape.png", "cmyk.jpg", "gray.jpg", "bilevel_1.png", "palette_P.png"])
def test_other_pictures_are_the_same_for_both(name: str) -> None:
    content = (IMAGES / name).read_bytes()
    assert np.array_equal(viewed(content), read_rgb(content, MAX_PIXELS))


def test_a_viewers_picture_has_the_size_that_is_seen() -> None:
    content = (IMAGES / "exif_orientation6.jpg").read_bytes()
    card = preprocess(content, SPEC, MAX_PIXELS)
    viewer = preprocess(content, replace(SPEC, policy="viewer"), MAX_PIXELS)
    assert (viewer.width, viewer.height) == (card.height, card.width)
    assert (viewer.grid.columns, viewer.grid.rows) == (card.grid.rows, card.grid.columns)
