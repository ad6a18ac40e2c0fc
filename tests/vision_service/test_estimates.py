"""What the first bytes of a picture promise is what preprocessing finds, or they are too few."""

from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, PngImagePlugin

from shared.errors import MediaTooLarge, MediaUnreadable
from tests.media_pools import NEVER, media_pool
from vision_service.preprocess.estimate import Estimate, estimate
from vision_service.preprocess.image import preprocess
from vision_service.preprocess.tiling import Policy, TilingSpec

IMAGES = sorted((Path(__file__).parents[1] / "golden/images").iterdir())
SPEC = TilingSpec(28, 1, 12, thumbnail=True)
MAX_PIXELS, TOKENS_PER_TILE = 1_000_000, 4
POLICIES: tuple[Policy, ...] = ("card", "viewer")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO")


def picture_bytes(width: int, height: int, image_format: str, orientation: int = 1, **options: Any) -> bytes:
    """Return a picture that says it has to be turned, in a format that can say so."""
    buffer = BytesIO()
    if image_format not in ("GIF", "BMP"):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        options.setdefault("exif", exif)
    if image_format == "MPO":
        options |= {"save_all": True, "append_images": [Image.new("RGB", (3, 5))]}
    Image.new("RGB", (width, height), (200, 30, 60)).save(buffer, image_format, **options)
    return buffer.getvalue()


def found(content: bytes, spec: TilingSpec) -> Estimate:
    picture = preprocess(content, spec, MAX_PIXELS)
    grid, tiles = picture.grid, len(picture.tiles)
    return Estimate(picture.width, picture.height, grid.columns, grid.rows, tiles, tiles * TOKENS_PER_TILE)


def estimated(head: bytes, spec: TilingSpec = SPEC) -> Estimate:
    return estimate(head, spec, MAX_PIXELS, TOKENS_PER_TILE)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_a_whole_picture_is_estimated_as_it_is(path: Path, policy: Policy) -> None:
    spec = replace(SPEC, policy=policy)
    assert estimated(path.read_bytes(), spec) == found(path.read_bytes(), spec)


@settings(deadline=None, max_examples=120)
@given(
    st.integers(1, 90), st.integers(1, 90), st.sampled_from(FORMATS), st.integers(0, 9), st.sampled_from(POLICIES),
    st.integers(1, 12), st.booleans(), st.integers(0, 2000),
)  # fmt: skip
def test_the_first_bytes_promise_what_is_found_or_are_too_few(
    width: int, height: int, image_format: str, orientation: int, policy: Policy, most: int, thumbnail: bool, cut: int
) -> None:
    content = picture_bytes(width, height, image_format, orientation)
    spec = TilingSpec(28, 1, most, thumbnail, policy)
    assert estimated(content, spec) == found(content, spec)
    if policy == "viewer" and image_format in ("PNG", "WEBP"):
        return  # which may keep the orientation behind the pixels
    try:
        promised = estimated(content[:cut], spec)
    except MediaUnreadable:
        return
    assert promised == found(content, spec)


@pytest.mark.parametrize("image_format", FORMATS)
def test_the_head_of_a_large_picture_is_enough_where_the_format_begins_with_it(image_format: str) -> None:
    noise = Image.effect_noise((600, 400), 90).convert("RGB")
    buffer = BytesIO()
    options = {"compression": "tiff_deflate"} if image_format == "TIFF" else {}
    noise.save(buffer, "JPEG" if image_format == "MPO" else image_format, **options)
    content = buffer.getvalue()
    if image_format == "TIFF":  # whose directory lies behind the pixels
        with pytest.raises(MediaUnreadable, match="more of the file"):
            estimated(content[:8192])
    else:
        assert estimated(content[:8192]) == found(content, SPEC)


def test_bytes_that_end_within_the_header_ask_for_more() -> None:
    content = picture_bytes(64, 32, "JPEG", exif=b"Exif\0\0" + bytes(5000))
    for size in (30, 1000, 5000):
        with pytest.raises(MediaUnreadable, match="send more of the file"):
            estimated(content[:size])
    assert estimated(content).width == 64


@pytest.mark.parametrize(
    "content", [b"", b"hello, world, this is no picture at all", b"RIFF\0\0\0\0WEBPnone" + bytes(40)]
)
def test_what_is_no_picture_is_unreadable(content: bytes) -> None:
    with pytest.raises(MediaUnreadable):
        estimated(content)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_picture_that_would_be_refused_is_refused(image_format: str) -> None:
    content = picture_bytes(60, 40, image_format)
    with pytest.raises(MediaTooLarge):
        estimate(content, SPEC, 2399, TOKENS_PER_TILE)
    assert estimate(content, SPEC, 2400, TOKENS_PER_TILE).width == 60


def test_an_orientation_behind_the_pixels_counts_where_the_bytes_reach_it() -> None:
    turned = picture_bytes(64, 32, "PNG", orientation=6)
    chunks = {turned[start + 4 : start + 8]: turned[start:end] for start, end in chunk_bounds(turned)}
    late = turned[:8] + chunks[b"IHDR"] + chunks[b"IDAT"] + chunks[b"eXIf"] + chunks[b"IEND"]
    viewer = replace(SPEC, policy="viewer")
    assert estimated(late, viewer) == found(late, viewer)
    assert (estimated(late, viewer).width, estimated(late[:50], viewer).width) == (32, 64)


def chunk_bounds(png: bytes) -> list[tuple[int, int]]:
    bounds, position = [], 8
    while position < len(png):
        end = position + 12 + int.from_bytes(png[position : position + 4], "big")
        bounds.append((position, end))
        position = end
    return bounds


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG", "TIFF"])
def test_an_orientation_told_in_xmp_counts_as_in_preprocessing(image_format: str) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    options: dict[str, Any] = {"xmp": xmp}
    if image_format == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        options = {"pnginfo": info}
    if image_format == "TIFF":
        options = {"tiffinfo": {700: xmp}}
    buffer = BytesIO()
    Image.new("RGB", (64, 32)).save(buffer, image_format, **options)
    for policy in POLICIES:
        spec = replace(SPEC, policy=policy)
        assert estimated(buffer.getvalue(), spec) == found(buffer.getvalue(), spec)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damaged_headers_raise_nothing_but_our_errors(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(IMAGES)).read_bytes())
    for position in data.draw(st.lists(st.integers(0, min(len(content), 400) - 1), max_size=8)):
        content[position] = data.draw(st.integers(0, 255))
    spec = replace(SPEC, policy=data.draw(st.sampled_from(POLICIES)))
    with suppress(MediaUnreadable, MediaTooLarge):
        estimated(bytes(content[: data.draw(st.integers(0, len(content)))]), spec)


async def test_a_worker_estimates() -> None:
    content = picture_bytes(84, 56, "JPEG")
    async with media_pool() as at:
        assert await at.estimate(content[:700], SPEC, TOKENS_PER_TILE, NEVER) == found(content, SPEC)
        with pytest.raises(MediaUnreadable, match="send more"):
            await at.estimate(content[:20], SPEC, TOKENS_PER_TILE, NEVER)
