"""Whatever a video is, its worker answers with the tiles of the frames asked for, or with one of our errors."""

import errno
import random
import sys
from collections.abc import Awaitable
from contextlib import AbstractAsyncContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.errors import MediaTooLarge, MediaUnreadable, ServiceError, VideoRangeEmpty
from tests import clips
from tests.clips import CLIPS, Clip, content_of, number_of
from tests.media_pools import CLIP_LIMITS, NEVER, media_pool, video_work
from vision_service.preprocess.frames import DecoderName, VideoSpec
from vision_service.preprocess.image import Picture
from vision_service.preprocess.tiling import Grid, TilingSpec
from vision_service.workers.pool import MediaPool

IMAGES = Path(__file__).parents[1] / "golden/images"
ONE_TILE = TilingSpec(160, 1, 1, thumbnail=True)


# Where decord 0.6.0 does not return the frame asked for: open groups of pictures, which is what libx265 makes unasked;
# MPEG-4 with B-frames; AVI with B-frames, whatever is in it; what an edit list leaves out.
DECORD_IS_WRONG = {
    "h264 mp4 open GOP",
    "h264 mkv open GOP",
    "h264 mp4 cut",
    "h265 mp4",
    "mpeg4 avi B-frames",
    "mpeg4 mp4 B-frames",
    "h264 avi B-frames",
}
DECORD_CANNOT = {"av1 mp4"}
needs_decord = pytest.mark.skipif(find_spec("decord") is None, reason="decord has wheels for x86-64 only")


def pool(decoder: DecoderName = "pyav", **options: Any) -> AbstractAsyncContextManager[MediaPool]:
    limits = {name: options.pop(name) for name in CLIP_LIMITS.keys() & options.keys()}
    return media_pool(video_work(decoder, **limits), **options)


async def prepared(
    at: MediaPool, content: bytes, segments: int = 8, decoder: DecoderName = "pyav", tiling: TilingSpec = ONE_TILE
) -> Picture:
    return await at.prepare(content, tiling, VideoSpec(segments, decoder=decoder), NEVER)


async def error_of(call: Awaitable[Picture]) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        await call
    return caught.value


def shown_by(picture: Picture) -> list[int | None]:
    """Return the numbers that the tiles of a clip of one tile per frame show."""
    return [number_of(tile) for tile in picture.tiles]


async def test_the_tiles_are_those_of_the_frames_that_are_named() -> None:
    async with pool() as at:
        for name in ("h264 mp4 open GOP", "h264 mp4 cut", "mpeg4 avi B-frames", "vp9 webm"):
            picture = await prepared(at, content_of(name))
            numbers = CLIPS[name].numbers
            assert shown_by(picture) == [numbers[frame.index] for frame in picture.frames]
            assert (picture.width, picture.height, picture.grid) == (160, 96, Grid(1, 1))


@needs_decord
async def test_decord_returns_the_frames_asked_for_except_where_it_is_known_to_be_wrong() -> None:
    async with pool("decord") as at:
        wrong, unreadable = set(), set()
        for name, clip in CLIPS.items():
            try:
                picture = await prepared(at, content_of(name), 16, "decord")
            except MediaUnreadable:
                unreadable.add(name)
                continue
            asked_for = [(clip.numbers[frame.index : frame.index + 1] or [None])[0] for frame in picture.frames]
            if shown_by(picture) != asked_for:
                wrong.add(name)
    assert (wrong, unreadable) == (DECORD_IS_WRONG, DECORD_CANNOT)


@needs_decord
async def test_both_decoders_make_the_same_tiles_where_decord_is_right() -> None:
    async with pool() as exact, pool("decord") as reference:
        for name in CLIPS.keys() - DECORD_IS_WRONG - DECORD_CANNOT:
            ours = await prepared(exact, content_of(name))
            theirs = await prepared(reference, content_of(name), decoder="decord")
            difference = np.abs(ours.tiles.astype(int) - theirs.tiles).max()
            assert difference <= 2, name
            assert [frame.index for frame in ours.frames] == [frame.index for frame in theirs.frames]
            times = [[frame.time_s for frame in picture.frames] for picture in (ours, theirs)]
            assert times[0] == pytest.approx(times[1], abs=1e-3)


async def test_a_short_video_repeats_frames() -> None:
    async with pool() as at:
        picture = await prepared(at, clips.encode(Clip("mp4", "libx264", 3)), segments=7)
    assert [frame.index for frame in picture.frames] == [0, 0, 1, 1, 1, 1, 2]
    assert shown_by(picture) == [0, 0, 1, 1, 1, 1, 2]


async def test_frames_are_cut_alike_and_their_thumbnails_come_last() -> None:
    async with pool() as at:
        picture = await prepared(at, content_of("h264 mp4"), 3, tiling=TilingSpec(80, 1, 6, thumbnail=True))
    assert picture.grid == Grid(3, 2)
    assert len(picture.tiles) == 3 * 7
    assert [number_of(tile) for tile in picture.tiles[6::7]] == [frame.index for frame in picture.frames]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no video"),
        (b"no video at all", "no video"),
        ((IMAGES / "animated.gif").read_bytes(), "no video"),
        ((IMAGES / "rgb_square.png").read_bytes(), "no video"),
        (b"#EXTM3U\nhttp://example.com/a.ts\n", "no video"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "damaged"),
        (content_of("h264 mp4")[:-200], "cut short"),
        (content_of("h264 mp4")[:2000], "cut short"),
        (content_of("h264 mkv open GOP")[:2000], "cut short"),
        (content_of("mpeg4 avi")[:5000], "cut short"),
        (content_of("vp9 webm")[:-1], "cut short"),
        (clips.sound_only(), "has no video"),
        (clips.cover_only(), "has no video"),
        (clips.encode(Clip("mp4", "ffv1", 3)), "coding"),
    ],
)
async def test_what_is_no_whole_video_is_unreadable_and_says_why(content: bytes, told: str) -> None:
    async with pool() as at:
        error = await error_of(prepared(at, content))
    assert type(error) is MediaUnreadable
    assert told in error.message


async def test_a_part_outside_of_the_video_is_empty() -> None:
    async with pool() as at:
        with pytest.raises(VideoRangeEmpty):
            await at.prepare(content_of("h264 mp4"), ONE_TILE, VideoSpec(4, 10.0), NEVER)


async def test_more_than_the_limits_is_too_large() -> None:
    content = content_of("h264 mp4")
    for limit in ({"max_pixels": 160 * 96 - 1}, {"max_clip_frames": 59}, {"max_clip_s": 2.3}, {"max_tiles": 7}):
        async with pool(**limit) as at:
            assert type(await error_of(prepared(at, content))) is MediaTooLarge, limit
    async with pool(max_pixels=160 * 96, max_clip_frames=60, max_clip_s=2.4, max_tiles=8) as at:
        assert len((await prepared(at, content)).tiles) == 8


async def test_a_video_that_claims_a_thousand_million_frames_is_too_large() -> None:
    async with pool() as at:
        error = await error_of(prepared(at, clips.claiming(content_of("h264 mp4"), 10**9)))
        assert type(error) is MediaTooLarge
        assert len((await prepared(at, content_of("h264 mp4"))).tiles) == 8


async def test_a_video_that_takes_too_long_is_too_large_and_the_next_one_is_decoded() -> None:
    long = clips.encode(Clip("avi", "mjpeg", 400, pixel_format="yuvj420p"))
    async with pool(timeout_s=0.001) as hasty:
        error = await error_of(prepared(hasty, long))
        assert type(error) is MediaTooLarge
        assert "seconds" in error.message
    async with pool() as patient:
        assert (await prepared(patient, long)).frames[-1].index == 373


async def test_a_video_that_takes_too_much_memory_is_too_large() -> None:
    large = clips.encode(Clip("avi", "mjpeg", 1, pixel_format="yuvj420p", size=(8000, 6000)))
    async with pool(memory_bytes=500 << 20, max_pixels=10**8) as small:
        assert type(await error_of(prepared(small, large, 1))) is MediaTooLarge
    async with pool(max_pixels=10**8) as enough:
        assert (await prepared(enough, large, 1)).width == 8000


async def test_wherever_memory_ends_the_video_is_too_large() -> None:
    large = clips.encode(Clip("mp4", "libx264", 2, size=(6400, 4800), options={"preset": "ultrafast"}))
    for megabytes in range(300, 450, 30):
        async with pool(memory_bytes=megabytes << 20, max_pixels=10**8) as at:
            assert type(await error_of(prepared(at, large, 2))) is MediaTooLarge


async def test_damaged_videos_raise_nothing_but_our_errors() -> None:
    rng = random.Random(3)
    async with pool(processes=2) as at:
        for name in ("h264 mp4 B-frames", "h264 mkv open GOP", "mpeg4 avi B-frames", "vp8 webm", "h265 mp4"):
            for _ in range(25):
                content = bytearray(content_of(name))
                for _ in range(rng.randrange(1, 30)):
                    content[rng.randrange(len(content))] = rng.randrange(256)
                try:
                    picture = await prepared(at, bytes(content))
                except (MediaUnreadable, MediaTooLarge, VideoRangeEmpty):
                    continue
                assert len(picture.tiles) == 8


# The worker itself with a decoder that fails as the video says, and else tells its process id as the frame's time.
FAULTY_WORKER = """
import os
import numpy as np
from av.error import FFmpegError
from vision_service.video.source import DecodedFrame
from vision_service.workers import answers, worker

class Source:
    frame_count, rate = 1, 1.0
    def __init__(self, content, limits):
        self.content = bytes(content)
    def frames(self, indices):
        if self.content != b"tell":
            raise {b"value": ValueError, b"os": OSError, b"memory": MemoryError}[self.content]("of the decoder's own")
        yield DecodedFrame(0, float(os.getpid()), np.zeros((4, 4, 3), np.uint8))

answers.source_of = lambda name: Source
worker.main()
"""


async def test_what_a_decoder_raises_is_the_videos_fault_and_the_worker_goes_on() -> None:
    async with pool(command=(sys.executable, "-c", FAULTY_WORKER)) as at:
        (first,) = (await prepared(at, b"tell", 1)).frames
        for content, expected in ((b"value", MediaUnreadable), (b"os", MediaUnreadable), (b"memory", MediaTooLarge)):
            error = await error_of(prepared(at, content, 1))
            assert type(error) is expected
            assert "own" not in error.message
        assert (await prepared(at, b"tell", 1)).frames == (first,)


# The worker itself, with a conversion to RGB that fails as FFmpeg's does.
UNCONVERTING_WORKER = """
import av.error
from vision_service.video import pyav
from vision_service.workers import worker

def fail(frame):
    raise av.error.{error}({code}, "of FFmpeg's own")

pyav._converted = fail
worker.main()
"""


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        ("BlockingIOError", errno.EAGAIN, MediaTooLarge),  # no memory for a thread
        ("MemoryError", errno.ENOMEM, MediaTooLarge),
        ("ArgumentError", errno.EINVAL, MediaUnreadable),
    ],
)
async def test_a_conversion_that_fails_is_told_as_what_it_is(error: str, code: int, expected: type) -> None:
    script = UNCONVERTING_WORKER.format(error=error, code=code)
    async with pool(command=(sys.executable, "-c", script)) as at:
        refusal = await error_of(prepared(at, content_of("h264 mp4")))
    assert type(refusal) is expected
    assert "own" not in refusal.message
