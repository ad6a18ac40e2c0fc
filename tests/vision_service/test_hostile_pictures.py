"""Pictures made to harm are refused or decoded within bounds, and their worker takes the next one."""

import random
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.errors import MediaTooLarge, MediaUnreadable
from tests.media_pools import NEVER, media_pool, picture_work
from vision_service.preprocess.image import Picture, preprocess
from vision_service.preprocess.tiling import TilingSpec
from vision_service.workers.pool import MediaPool

IMAGES = Path(__file__).parents[1] / "golden/images"
SPEC = TilingSpec(28, 1, 12, thumbnail=True)
MAX_PIXELS = 40_000_000
RED, BLUE = (255, 0, 0), (0, 0, 255)
FRAMES = 100_000


def saved(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def pixels(width: int, height: int) -> bytes:
    """Return black pixels as a PNG keeps them."""
    row, compressor = bytes(1 + 3 * width), zlib.compressobj(9)
    return b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()


def animated_gif() -> bytes:
    """Return a red frame, and a great many that are cut short."""
    first = saved(Image.new("RGB", (8, 4), RED).quantize(4), "GIF")
    return first[:-1] + b"\x2c" + bytes(8) + b"\0\2\1\0\0" + b"\x2c\0\0\0\0\1\0\1\0\0\2\1\0\0" * FRAMES + b";"


def animated_png() -> bytes:
    """Return a red picture, and a great many frames of nonsense."""

    def numbered(name: bytes, number: int, content: bytes) -> bytes:
        return chunk(name, number.to_bytes(4, "big") + content)

    control = b"\0\0\0\10\0\0\0\4" + bytes(8) + b"\0\1\0\1\0\0"
    red = zlib.compress((b"\0" + bytes(RED) * 8) * 4)
    frames = b"".join(
        numbered(b"fcTL", 2 * number + 1, control) + numbered(b"fdAT", 2 * number + 2, b"?") for number in range(FRAMES)
    )
    animation = chunk(b"acTL", (FRAMES + 1).to_bytes(4, "big") + bytes(4))
    return png(8, 4, animation, numbered(b"fcTL", 0, control), chunk(b"IDAT", red), frames)


def animated_webp() -> bytes:
    """Return a red frame, and a great many blue ones."""
    images = [Image.new("RGB", (8, 4), color) for color in (RED, BLUE)]
    two = saved(images[0], "WEBP", save_all=True, append_images=images[1:], lossless=True, minimize_size=False)
    start = two.index(b"ANMF", two.index(b"ANMF") + 4)
    content = two[8:start] + two[start:] * FRAMES
    return b"RIFF" + len(content).to_bytes(4, "little") + content


def peak_bytes(at: MediaPool) -> int:
    """Return the most memory that the only worker has had."""
    (worker,) = at._workers
    status = Path(f"/proc/{worker._process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


async def prepared(at: MediaPool, content: bytes) -> Picture:
    return await at.prepare(content, SPEC, None, NEVER)


async def test_every_picture_is_in_a_worker_what_it_is_here() -> None:
    async with media_pool(picture_work(MAX_PIXELS)) as at:
        for path in sorted(IMAGES.iterdir()):
            for policy in ("card", "viewer"):
                spec = TilingSpec(28, 1, 12, True, policy)
                expected = preprocess(path.read_bytes(), spec, MAX_PIXELS)
                picture = await at.prepare(path.read_bytes(), spec, None, NEVER)
                assert np.array_equal(picture.tiles, expected.tiles), path.name
                assert (picture.width, picture.height, picture.grid) == (expected.width, expected.height, expected.grid)


async def test_a_small_file_of_432_megabytes_of_pixels_is_refused_unread() -> None:
    content = png(12_000, 12_000, chunk(b"IDAT", pixels(12_000, 12_000)))
    assert len(content) < 500_000
    async with media_pool(picture_work(MAX_PIXELS)) as at:
        await prepared(at, png(8, 4, chunk(b"IDAT", pixels(8, 4))))
        before = peak_bytes(at)
        with pytest.raises(MediaTooLarge):
            await prepared(at, content)
        assert peak_bytes(at) - before < 50 << 20


async def test_a_picture_that_needs_more_memory_than_its_worker_has_is_too_large() -> None:
    large = png(6000, 6000, chunk(b"IDAT", pixels(6000, 6000)))
    async with media_pool(picture_work(MAX_PIXELS), memory_bytes=220 << 20) as at:
        with pytest.raises(MediaTooLarge):
            await prepared(at, large)
        assert (await prepared(at, png(8, 4, chunk(b"IDAT", pixels(8, 4))))).width == 8
        assert peak_bytes(at) < 220 << 20
        assert len(at._workers) == 1


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "BMP", "GIF"])
async def test_the_longest_slivers_are_decoded(image_format: str) -> None:
    async with media_pool(picture_work(MAX_PIXELS)) as at:
        for size in ((1, 65_500), (65_500, 1)):
            picture = await prepared(at, saved(Image.new("RGB", size, RED), image_format))
            assert (picture.width, picture.height) == size
        assert peak_bytes(at) < 200 << 20


@pytest.mark.parametrize("animation", [animated_gif, animated_png, animated_webp])
async def test_of_a_hundred_thousand_frames_the_first_is_read(animation: object) -> None:
    assert callable(animation)
    async with media_pool(picture_work(MAX_PIXELS)) as at:
        picture = await prepared(at, animation())
        assert (picture.width, picture.height) == (8, 4)
        assert np.all(picture.tiles == np.array(RED, np.uint8))
        assert peak_bytes(at) < 200 << 20


@pytest.mark.parametrize(
    "name", ["rgb_landscape.png", "exif_orientation6.jpg", "lossless_alpha.webp", "animated.gif", "cmyk.jpg"]
)
async def test_cut_and_changed_files_are_refused_or_decoded_by_a_worker_that_stays(name: str) -> None:
    content, rng = (IMAGES / name).read_bytes(), random.Random(7)
    async with media_pool(picture_work(MAX_PIXELS)) as at:
        await at.start()
        before = at._workers.copy()
        for _ in range(40):
            damaged = bytearray(content[: rng.randrange(1, len(content) + 1)])
            for _ in range(rng.randrange(12)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            try:
                await prepared(at, bytes(damaged))
            except (MediaUnreadable, MediaTooLarge):
                continue
        assert at._workers == before
        assert peak_bytes(at) < 400 << 20


@pytest.mark.parametrize("image_format", ["BMP", "TIFF"])
async def test_so_are_those_of_formats_that_are_stored_plainly(image_format: str) -> None:
    content, rng = saved(Image.effect_noise((90, 60), 80).convert("RGB"), image_format), random.Random(8)
    async with media_pool(picture_work(MAX_PIXELS)) as at:
        await at.start()
        before = at._workers.copy()
        for _ in range(40):
            damaged = bytearray(content)
            for _ in range(rng.randrange(1, 12)):
                damaged[rng.choice((rng.randrange(60), rng.randrange(len(damaged) - 200, len(damaged))))] = (
                    rng.randrange(256)
                )
            try:
                await prepared(at, bytes(damaged[: rng.choice((len(damaged), rng.randrange(1, len(damaged))))]))
            except (MediaUnreadable, MediaTooLarge):
                continue
        assert at._workers == before
        assert peak_bytes(at) < 400 << 20
