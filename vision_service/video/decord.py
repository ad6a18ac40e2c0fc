"""Decodes videos with decord, as the model cards' code does, its mistakes included.

decord does not return the frame that was asked for in videos with open groups of pictures, in MPEG-4 with B-frames, in
AVI, and in videos with edit lists. It is here for those who compare with the model cards. It must never be imported
into a process that has loaded PyAV: each brings its own FFmpeg, and they get into one another's way.
"""

import math
from collections.abc import Iterator, Sequence
from io import BytesIO

from decord import DECORDError, VideoReader, cpu, logging

from shared.errors import MediaUnreadable
from vision_service.video.container import recognize
from vision_service.video.source import DecodedFrame, VideoLimits


class DecordSource:
    """A video in memory, read frame by frame as the model cards' code reads it.

    Raises `MediaUnreadable` and `MediaTooLarge`.
    """

    def __init__(self, content: bytes, limits: VideoLimits) -> None:
        recognize(content)
        logging.set_level(logging.QUIET)
        self._limits = limits
        try:
            self._reader = VideoReader(BytesIO(content), ctx=cpu(0), num_threads=1)
            self._count = len(self._reader)
            self._rate = float(self._reader.get_avg_fps())
        except (DECORDError, RuntimeError) as error:
            raise MediaUnreadable("The video is damaged, or has a coding that is not accepted.") from error
        if self._count < 1:
            raise MediaUnreadable("The video has no frames.")
        if not (math.isfinite(self._rate) and self._rate > 0):
            self._rate = 1.0
        limits.check_length(self._count, self._count / self._rate)

    @property
    def frame_count(self) -> int:
        """Number of packets, which may be more than the frames that are shown."""
        return self._count

    @property
    def rate(self) -> float:
        """Average frames per second."""
        return self._rate

    def frames(self, indices: Sequence[int]) -> Iterator[DecodedFrame]:
        """Yield the frames asked for; see `VideoSource`."""
        for index in dict.fromkeys(indices):
            try:
                rgb = self._reader[index].asnumpy()
            except (DECORDError, RuntimeError, IndexError) as error:
                raise MediaUnreadable("A frame of the video cannot be decoded.") from error
            self._limits.check_size(rgb.shape[1], rgb.shape[0])
            yield DecodedFrame(index, self._time_s(index), rgb)

    def _time_s(self, index: int) -> float:
        first, time = (float(self._reader.get_frame_timestamp(number)[0]) for number in (0, index))
        # decord has no times for AVI with B-frames, and says so with a number of 17 digits.
        return time - first if 0 <= time - first <= self._limits.max_clip_s and abs(first) < 1e9 else index / self._rate
