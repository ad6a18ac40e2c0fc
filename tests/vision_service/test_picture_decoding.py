"""Whatever bytes come, preprocessing returns tiles or one of two errors in our own words."""

import re
import struct
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shared.errors import MediaTooLarge, MediaUnreadable, ServiceError
from vision_service.preprocess.image import preprocess
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
    with suppress(MediaUnreadable, MediaTooLarge):
        preprocess(bytes(content[: data.draw(st.integers(1, len(content)))]), SPEC, MAX_PIXELS)
