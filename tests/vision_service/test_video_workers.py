"""Whatever a video is, its worker answers with tiles or one of our errors, or is replaced; the service goes on."""

import asyncio
import errno
import os
import random
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.errors import DeadlineExceeded, MediaTooLarge, MediaUnreadable, ServiceError, VideoRangeEmpty
from tests import clips
from tests.clips import CLIPS, Clip, content_of, number_of
from vision_service.batcher import Deadline
from vision_service.preprocess.frames import DecoderName, VideoSpec
from vision_service.preprocess.image import Picture
from vision_service.preprocess.tiling import Grid, TilingSpec
from vision_service.video.pool import WORKER, VideoPool, WorkerSettings
from vision_service.video.source import VideoLimits

IMAGES = Path(__file__).parents[1] / "golden/images"
NEVER = Deadline(None)
ONE_TILE = TilingSpec(160, 1, 1, thumbnail=True)
LIMITS = {"max_pixels": 1_000_000, "max_clip_frames": 10_000, "max_clip_s": 1000.0, "max_tiles": 100}

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


@asynccontextmanager
async def pool(
    decoder: DecoderName = "pyav",
    processes: int = 1,
    timeout_s: float = 60,
    memory_bytes: int = 4 << 30,
    command: tuple[str, ...] = WORKER,
    start_timeout_s: float = 60,
    **limits: Any,
) -> AsyncIterator[VideoPool]:
    settings = WorkerSettings(decoder, VideoLimits(**(LIMITS | limits)), timeout_s, memory_bytes, start_timeout_s)
    opened = VideoPool(settings, processes, command)
    try:
        yield opened
    finally:
        opened.close()


async def prepared(
    at: VideoPool, content: bytes, segments: int = 8, decoder: DecoderName = "pyav", tiling: TilingSpec = ONE_TILE
) -> Picture:
    return await at.prepare(content, VideoSpec(segments, decoder=decoder), tiling, NEVER)


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
            await at.prepare(content_of("h264 mp4"), VideoSpec(4, 10.0), ONE_TILE, NEVER)


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


# A worker that does what its first video says: crash, end, hang, talk nonsense, or tell its process id as the width.
SCRIPTED_WORKER = """
import os, signal, sys, time
from vision_service.video.messages import read_message, write_message
write_message(sys.stdout.buffer, {"ready": True})
while True:
    _, content = read_message(sys.stdin.buffer)
    order = bytes(content).decode()
    if order == "crash": os.kill(os.getpid(), signal.SIGSEGV)
    if order == "end": sys.exit(1)
    if order == "hang": time.sleep(1000)
    if order == "babble": sys.stdout.buffer.write(b"?" * 100); sys.stdout.buffer.flush(); time.sleep(1000)
    if order == "refuse": write_message(sys.stdout.buffer, {"reason": "MEDIA_UNREADABLE", "message": "No."}); continue
    answer = {"width": os.getpid(), "height": 1, "columns": 1, "rows": 1, "frames": [[0, 0.0]]}
    write_message(sys.stdout.buffer, answer, bytes(160 * 160 * 3))
"""
SCRIPTED = (sys.executable, "-c", SCRIPTED_WORKER)


# The worker itself with a decoder that fails as the video says, and else tells its process id as the frame's time.
FAULTY_WORKER = """
import os
import numpy as np
from av.error import FFmpegError
from vision_service.video import worker
from vision_service.video.source import DecodedFrame

class Source:
    frame_count, rate = 1, 1.0
    def __init__(self, content, limits):
        self.content = bytes(content)
    def frames(self, indices):
        if self.content != b"tell":
            raise {b"value": ValueError, b"os": OSError, b"memory": MemoryError}[self.content]("of the decoder's own")
        yield DecodedFrame(0, float(os.getpid()), np.zeros((4, 4, 3), np.uint8))

worker.source_of = lambda name: Source
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
from vision_service.video import pyav, worker

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


async def worker_of(at: VideoPool) -> int:
    return (await prepared(at, b"tell")).width


async def test_a_worker_serves_many_videos_and_outlives_those_it_refuses() -> None:
    async with pool(command=SCRIPTED) as at:
        first = await worker_of(at)
        assert (await error_of(prepared(at, b"refuse"))).message == "No."
        assert await worker_of(at) == first
        seen = {await worker_of(at) for _ in range(100)}
        assert len(seen) == 2  # it was replaced once, because decoders leak


async def test_a_crash_is_the_videos_fault_and_the_next_video_has_a_new_worker() -> None:
    async with pool(command=SCRIPTED) as at:
        first = await worker_of(at)
        assert type(await error_of(prepared(at, b"crash"))) is MediaUnreadable
        assert await worker_of(at) != first


async def test_a_worker_that_hangs_is_ended() -> None:
    async with pool(command=SCRIPTED, timeout_s=1.0) as at:
        first = await worker_of(at)
        assert type(await error_of(prepared(at, b"hang"))) is MediaTooLarge
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)


@pytest.mark.parametrize("order", [b"end", b"babble"])
async def test_a_worker_that_fails_by_itself_is_a_fault_of_ours(order: bytes) -> None:
    async with pool(command=SCRIPTED) as at:
        with pytest.raises(RuntimeError, match="video worker"):
            await prepared(at, order)
        assert await worker_of(at)


async def test_a_worker_that_cannot_start_is_a_fault_of_ours() -> None:
    async with pool(command=(sys.executable, "-c", "raise SystemExit(3)")) as at:
        with pytest.raises(RuntimeError, match="did not start"):
            await prepared(at, b"tell")


async def test_a_worker_that_hangs_while_it_starts_is_ended_and_replaced(tmp_path: Path) -> None:
    script = (
        f"""
import os, pathlib, time
started = pathlib.Path({str(tmp_path / "started")!r})
if not started.exists():
    started.write_text(str(os.getpid()))
    time.sleep(1000)
"""
        + SCRIPTED_WORKER
    )
    async with pool(command=(sys.executable, "-c", script), start_timeout_s=1.0) as at:
        with pytest.raises(RuntimeError, match="did not start"):
            await prepared(at, b"tell")
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "started").read_text()), 0)
    async with pool(command=(sys.executable, "-c", script)) as at:
        assert await worker_of(at)


async def test_closing_ends_a_worker_that_is_being_started(tmp_path: Path) -> None:
    script = f"import os, pathlib, time; pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch(); time.sleep(1000)"
    async with pool(command=(sys.executable, "-c", script), processes=3) as at:
        calls = [asyncio.create_task(prepared(at, b"tell")) for _ in range(3)]
        while not any(tmp_path.iterdir()):  # one is up, the others may be anywhere on their way
            await asyncio.sleep(0.001)
        at.close()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, RuntimeError | asyncio.CancelledError) for outcome in outcomes), outcomes
    for worker in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(worker.name), 0)


async def test_a_pool_that_was_closed_while_a_process_was_made_ends_that_process(tmp_path: Path) -> None:
    # The pool looks at its command when it makes a process: this one lets the pool be closed at that moment.
    script = f"import os, pathlib, time; pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch(); time.sleep(1000)"
    making, closed = threading.Event(), threading.Event()

    class Command(Sequence[str]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: Any) -> Any:
            making.set()
            assert closed.wait(10)
            return (sys.executable, "-c", script)[index]

    at = VideoPool(WorkerSettings("pyav", VideoLimits(**LIMITS), 60, 4 << 30), 1, Command())
    call = asyncio.create_task(prepared(at, b"tell"))
    await asyncio.to_thread(making.wait)
    at.close()
    closed.set()
    async with asyncio.timeout(30):
        with pytest.raises(RuntimeError, match="closed"):
            await call
    for worker in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(worker.name), 0)


async def test_a_video_that_nobody_waits_for_any_more_is_not_decoded() -> None:
    async with pool(command=("/nowhere",)) as at:
        with pytest.raises(DeadlineExceeded):
            await at.prepare(b"", VideoSpec(4), ONE_TILE, Deadline(0.0))


async def test_closing_ends_the_workers_whatever_they_do() -> None:
    async with pool(command=SCRIPTED) as at:
        worker = await worker_of(at)
        call = asyncio.create_task(prepared(at, b"hang"))
        await asyncio.sleep(0.2)
        at.close()
        with pytest.raises((ServiceError, RuntimeError, asyncio.CancelledError)):
            await call
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)


async def test_workers_know_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISION_EMBEDDING_KEY", "secret")
    script = SCRIPTED_WORKER.replace('os.getpid(), "height"', "1 + ('VISION_EMBEDDING_KEY' in os.environ), \"height\"")
    async with pool(command=(sys.executable, "-c", script)) as at:
        assert await worker_of(at) == 1
