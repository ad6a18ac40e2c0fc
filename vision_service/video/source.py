"""What every decoder of videos offers, and how much of a video it may take on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shared.errors import MediaTooLarge

Rgb = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class VideoLimits:
    """The most that a video may have: pixels per frame, frames, seconds, and tiles of the frames seen."""

    max_pixels: int
    max_clip_frames: int
    max_clip_s: float
    max_tiles: int

    def check_size(self, width: int, height: int) -> None:
        """Raise `MediaTooLarge` for frames of too many pixels."""
        if width * height > self.max_pixels:
            raise MediaTooLarge(f"A frame of a video may have at most {self.max_pixels} pixels.")

    def check_length(self, frame_count: int, duration_s: float) -> None:
        """Raise `MediaTooLarge` for a video of too many frames or seconds."""
        if frame_count > self.max_clip_frames:
            raise MediaTooLarge(f"A video may have at most {self.max_clip_frames} frames.")
        if duration_s > self.max_clip_s:
            raise MediaTooLarge(f"A video may last at most {self.max_clip_s:g} seconds.")


@dataclass(frozen=True, slots=True, eq=False)
class DecodedFrame:
    """A frame [height, width, 3] as it is to be looked at, its number, and seconds from the first frame to it."""

    index: int
    time_s: float
    rgb: Rgb


class VideoSource(Protocol):
    """A video that has been opened. `rate` is its average frames per second; frames count in order of presentation."""

    @property
    def frame_count(self) -> int:
        """Number of frames."""

    @property
    def rate(self) -> float:
        """Average frames per second, as the container has it."""

    def frames(self, indices: Sequence[int]) -> Iterator[DecodedFrame]:
        """Yield each of the frames asked for once, in any order, holding one at a time.

        Raises `MediaUnreadable` where one cannot be decoded and `MediaTooLarge` where one has too many pixels.
        """
