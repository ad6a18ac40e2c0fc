"""The frame that comes is the frame that was asked for, in every codec and container."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tests.clips as clips
from shared.errors import MediaUnreadable, VideoRangeEmpty
from tests.clips import CLIPS, Clip, content_of, number_of
from vision_service.preprocess.frames import VideoSpec, choose_frames
from vision_service.video.pyav import PyAvSource
from vision_service.video.source import VideoLimits

LIMITS = VideoLimits(max_pixels=1_000_000, max_clip_frames=10_000, max_clip_s=1000, max_tiles=100)
SMALL = {"preset": "ultrafast", "x264-params": "bframes=3:b-adapt=0:keyint=12"}


def numbers_of(content: bytes, indices: list[int]) -> dict[int, int | None]:
    """Return the numbers that the frames asked for show."""
    return {frame.index: number_of(frame.rgb) for frame in PyAvSource(content, LIMITS).frames(indices)}


@pytest.mark.parametrize("name", CLIPS)
def test_every_frame_of_a_clip_comes_with_its_time(name: str) -> None:
    clip, source = CLIPS[name], PyAvSource(content_of(name), LIMITS)
    assert source.frame_count == len(clip.numbers)
    frames = sorted(source.frames(range(source.frame_count)), key=lambda frame: frame.index)
    assert [number_of(frame.rgb) for frame in frames] == clip.numbers
    assert [frame.time_s for frame in frames] == pytest.approx(clip.times_s, abs=1e-3)  # Matroska counts milliseconds


@pytest.mark.parametrize("name", CLIPS)
def test_a_few_frames_of_a_clip_are_the_ones_asked_for(name: str) -> None:
    clip, rng = CLIPS[name], random.Random(7)
    choices = [[0], [len(clip.numbers) - 1], list(range(3, len(clip.numbers), 7)), [12, 13]]
    choices += [rng.sample(range(len(clip.numbers)), rng.randrange(1, 6)) for _ in range(8)]
    for indices in choices:
        assert numbers_of(content_of(name), indices) == {index: clip.numbers[index] for index in indices}


def test_a_frame_that_is_asked_for_twice_comes_once() -> None:
    source = PyAvSource(content_of("h264 mp4"), LIMITS)
    assert [frame.index for frame in source.frames([5, 5, 9, 5])] == [5, 9]


@pytest.mark.parametrize(
    ("matrix", "undone"),
    [
        ((1, 0, 0, 1), lambda rgb: rgb),
        ((0, 1, -1, 0), lambda rgb: np.rot90(rgb, 1)),  # a quarter clockwise
        ((-1, 0, 0, -1), lambda rgb: np.rot90(rgb, 2)),
        ((0, -1, 1, 0), lambda rgb: np.rot90(rgb, -1)),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
        ((0, 1, 1, 0), lambda rgb: rgb.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda rgb: np.rot90(rgb.swapaxes(0, 1), 2)),
    ],
)
def test_a_video_is_turned_as_its_display_matrix_says(
    matrix: tuple[int, ...], undone: Callable[[clips.Frame], clips.Frame]
) -> None:
    content = clips.encode(Clip("mov", "libx264", 20, SMALL, rewrite=clips.with_matrix(*matrix)))
    for frame in PyAvSource(content, LIMITS).frames([3, 17]):
        assert frame.rgb.flags.c_contiguous
        assert number_of(undone(frame.rgb)) == frame.index


def test_a_colour_matrix_that_cannot_be_converted_is_read_as_none() -> None:
    plain = {frame.index: frame.rgb for frame in PyAvSource(colourful(), LIMITS).frames([0, 2])}
    for matrix in clips.MATRICES:
        for frame in PyAvSource(colourful(matrix), LIMITS).frames([0, 2]):
            assert np.array_equal(frame.rgb, plain[frame.index]), matrix
    (known,) = PyAvSource(colourful("bt709"), LIMITS).frames([2])
    assert not np.array_equal(known.rgb, plain[2])


def colourful(matrix: str = "undef") -> bytes:
    """Return a video of three frames with colours in them, equal but for what it says of their matrix."""
    noise = np.random.default_rng(5).integers(0, 256, (3, 6, 10, 3), np.uint8).repeat(16, axis=1).repeat(16, axis=2)
    return clips.encode(Clip("mp4", "libx264", 3, {"x264-params": f"colormatrix={matrix}"}), list(noise))


def test_a_frame_that_is_never_shown_is_not_counted() -> None:
    content = clips.with_a_hidden_frame(content_of("vp8 webm"), 20)
    source = PyAvSource(content, LIMITS)
    assert source.frame_count == 59
    assert numbers_of(content, [19, 20, 40]) == {19: 19, 20: 21, 40: 41}


def test_a_false_keyframe_does_no_harm() -> None:
    content = clips.with_keyframes_at(content_of("h264 mp4"), 0, 7, 20, 31, 50)
    assert numbers_of(content, [8, 30, 55]) == {8: 8, 30: 30, 55: 55}


def test_what_comes_after_the_last_frame_asked_for_is_not_decoded() -> None:
    content = clips.damaged(content_of("h264 mp4"), 30)
    assert numbers_of(content, [4, 29]) == {4: 4, 29: 29}


def test_a_frame_that_is_damaged_is_told_and_not_replaced_by_another() -> None:
    content = clips.damaged(content_of("h264 mp4"), 12)
    with pytest.raises(MediaUnreadable, match="cannot be decoded"):
        list(PyAvSource(content, LIMITS).frames([4, 40]))


def test_a_part_behind_the_end_is_empty_and_one_that_touches_it_is_not() -> None:
    assert choose_frames(100, 10.0, VideoSpec(4, 5.0, 60.0)) == [56, 68, 80, 93]  # 24.5 rounds to even
    assert choose_frames(100, 10.0, VideoSpec(1, 10.0, 60.0)) == [99]
    for start_s, end_s in ((12.0, None), (1e300, None), (None, -1.0), (-1e300, -1e300)):
        with pytest.raises(VideoRangeEmpty):
            choose_frames(100, 10.0, VideoSpec(4, start_s, end_s))


@given(st.integers(1, 5000), st.floats(0.1, 240), st.integers(1, 64))
def test_the_frames_seen_lie_within_the_video_in_order(frame_count: int, rate: float, segments: int) -> None:
    indices = choose_frames(frame_count, rate, VideoSpec(segments))
    assert len(indices) == segments
    assert indices == sorted(indices)
    assert 0 <= indices[0] <= indices[-1] < frame_count
