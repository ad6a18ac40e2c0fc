"""Chooses the frames of a video that are seen, exactly as the model cards' code does."""

from dataclasses import dataclass
from typing import Literal

from shared.errors import VideoRangeEmpty

DecoderName = Literal["pyav", "decord"]
DEFAULT_SEGMENTS = 8
# The model cards' stand-ins for "from the beginning" and "to the end", in seconds.
_BEGINNING, _END = -1e5, 1e5
_MAX_FRAME = 1e15  # keeps any product of a rate and a time a number


@dataclass(frozen=True, slots=True)
class VideoSpec:
    """Which frames of a video are seen: the middle of each of `segment_count` equal parts, between two times.

    Times in seconds; None is the first or the last frame. All of it is part of an embedding's identity, the decoder
    too, because decoders differ.
    """

    segment_count: int
    start_s: float | None = None
    end_s: float | None = None
    decoder: DecoderName = "pyav"


def choose_frames(frame_count: int, rate: float, spec: VideoSpec) -> list[int]:
    """Return the numbers of the frames to be seen, one per segment; a short video repeats frames.

    `rate` is the video's average frames per second. Raises `VideoRangeEmpty` where they would leave the video.
    """
    start = max(0, _frame_at(_BEGINNING if spec.start_s is None else spec.start_s, rate))
    end = min(_frame_at(_END if spec.end_s is None else spec.end_s, rate), frame_count - 1)
    length = (end - start) / spec.segment_count
    # As the reference computes it: both roundings are half to even, and int() cuts.
    indices = [int(start + length / 2 + round(length * segment)) for segment in range(spec.segment_count)]
    if not all(0 <= index < frame_count for index in indices):
        raise VideoRangeEmpty("The part of the video that was asked for lies outside of it.")
    return indices


def _frame_at(seconds: float, rate: float) -> int:
    return round(min(max(seconds * rate, -_MAX_FRAME), _MAX_FRAME))
