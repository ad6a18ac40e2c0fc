"""Decodes videos with PyAV: the frame that comes is the frame that was asked for.

A first pass reads the packets without decoding them, which tells when every frame is shown. A second pass decodes only
the runs of packets that the frames asked for need: each run begins at a keyframe that is shown no later than the frame,
and ends with the last frame's packet, after which the decoder is drained. Nothing depends on the container's index, on
what seeking does, or on how many frames a decoder holds back.
"""

import errno
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Final, cast

import av
import numpy as np
from av.buffer import Buffer
from av.container import InputContainer
from av.error import FFmpegError
from av.video import VideoStream
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame as AvFrame

from shared.errors import MediaTooLarge, MediaUnreadable
from vision_service.video.container import recognize
from vision_service.video.source import DecodedFrame, Rgb, VideoLimits

_CODECS: Final = frozenset(
    {"h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg1video", "mpeg2video", "mpeg4", "mjpeg", "h263", "prores"}
)
_THREADS: Final = 2
_NO_MATRIX: Final = 2  # AVCOL_SPC_UNSPECIFIED
_PADDING: Final = 1 << 16  # pixels


@dataclass(frozen=True, slots=True)
class _Packets:
    """What the packets of a video say, in the order they are decoded in.

    `times` are presentation times in units of the stream, None for a packet that is decoded but never shown; `keys` the
    positions of keyframes; `timed` whether every frame that is shown has a time of its own.
    """

    times: list[int | None]
    keys: list[int]
    timed: bool

    def order(self) -> list[int]:
        """Return the positions of the frames that are shown, in order of presentation."""
        shown = [position for position, time in enumerate(self.times) if time is not None]
        return sorted(shown, key=lambda position: self.times[position] or 0) if self.timed else shown

    def start_for(self, position: int) -> int:
        """Return where decoding has to begin for the frame at `position`.

        A keyframe that is shown after the frame does not help: what lies between the two in decoding order may refer to
        frames before the keyframe ("open" groups of pictures).
        """
        time = self.times[position]
        for key in reversed(self.keys[: bisect_right(self.keys, position)]):
            key_time = self.times[key]
            if time is not None and key_time is not None and key_time <= time:
                return key
        return 0


class PyAvSource:
    """A video in memory, decoded by FFmpeg's libraries through PyAV. Rotation is applied, edit lists are obeyed.

    Raises `MediaUnreadable` and `MediaTooLarge`.
    """

    def __init__(self, content: bytes, limits: VideoLimits) -> None:
        self._content = content
        self._format = recognize(content)
        self._limits = limits
        with self._opened() as (container, stream):
            limits.check_size(stream.codec_context.width, stream.codec_context.height)
            limits.check_length(stream.frames, (container.duration or 0) / av.time_base)
            self._time_base = float(stream.time_base or 1)
            self._packets = self._scan(container, stream)
            self._order = self._packets.order()
            if not self._order:
                raise MediaUnreadable("The video has no frames.")
            self._rate = float(stream.average_rate or 0) or self._mean_rate()
        limits.check_length(self.frame_count, self._time_s(self.frame_count - 1))

    @property
    def frame_count(self) -> int:
        """Number of frames that are shown."""
        return len(self._order)

    @property
    def rate(self) -> float:
        """Average frames per second."""
        return self._rate

    def frames(self, indices: Sequence[int]) -> Iterator[DecodedFrame]:
        """Yield the frames asked for; see `VideoSource`."""
        missing = set(indices)
        # A container may call a picture a keyframe that needs earlier ones: then everything is decoded, once.
        everything = [range(len(self._packets.times))]
        for runs in [self._runs(missing), everything] if self._packets.timed else [everything]:
            for index, frame in self._decode(runs):
                if index in missing:
                    missing.remove(index)
                    yield DecodedFrame(index, self._time_s(index), self._rgb(frame))
                if not missing:
                    return
        raise MediaUnreadable("A frame of the video cannot be decoded.")

    @contextmanager
    def _opened(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        # Bytes only: no other file, no address is opened, whatever the container refers to.
        options = {"protocol_whitelist": "none", "format_whitelist": self._format, "codec_whitelist": ",".join(_CODECS)}
        with (
            _translated("The video is damaged."),
            av.open(
                BytesIO(self._content),
                "r",
                format=self._format,
                container_options=options,
                metadata_errors="ignore",
            ) as container,
        ):
            stream = _video_of(container)
            stream.codec_context.thread_count = _THREADS
            # Twice as many, because this counts what a decoder pads; frames are counted again when they come.
            stream.codec_context.options = {"max_pixels": str(2 * self._limits.max_pixels + _PADDING)}
            yield container, stream

    def _scan(self, container: InputContainer, stream: VideoStream) -> _Packets:
        times: list[int | None] = []
        keys: list[int] = []
        seen: set[int] = set()
        timed = self._format != "avi"  # which has no times: those of its packets are guesses
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if packet.is_keyframe:
                keys.append(len(times))
            time = packet.pts or 0
            shown = not packet.is_discard and _is_shown(stream.codec_context.name, memoryview(packet))
            if shown:
                timed = timed and packet.pts is not None and time not in seen
                seen.add(time)
            times.append(time if shown else None)
            self._limits.check_length(len(times), 0)
        return _Packets(times, keys, timed)

    def _runs(self, indices: set[int]) -> list[range]:
        """Return the positions of packets to decode for some frames, in order, none twice."""
        runs: list[range] = []
        for position in sorted(self._order[index] for index in indices):
            start = self._packets.start_for(position)
            if runs and start < runs[-1].stop:
                runs[-1] = range(min(start, runs[-1].start), position + 1)
            else:
                runs.append(range(start, position + 1))
        return runs

    def _decode(self, runs: list[range]) -> Iterator[tuple[int, AvFrame]]:
        """Yield the frames of some runs of packets with their numbers."""
        numbers = {self._packets.times[position]: index for index, position in enumerate(self._order)}
        with self._opened() as (container, stream):
            frames = _decoded(container, stream, runs)
            if self._packets.timed:
                yield from ((numbers[frame.pts], frame) for frame in frames if frame.pts in numbers)
            else:
                yield from enumerate(frames)

    def _rgb(self, frame: AvFrame) -> Rgb:
        self._limits.check_size(frame.width, frame.height)
        with _translated("The video has colours that cannot be converted."):
            rgb = _converted(frame)
        matrix = frame.side_data.get("DISPLAYMATRIX")
        return rgb if matrix is None else _turned(rgb, np.frombuffer(memoryview(cast(Buffer, matrix)), np.int32))

    def _time_s(self, index: int) -> float:
        if not self._packets.timed:
            return index / self._rate
        first, time = (self._packets.times[self._order[number]] or 0 for number in (0, index))
        return (time - first) * self._time_base

    def _mean_rate(self) -> float:
        span_s = self._time_s(self.frame_count - 1) if self._packets.timed else 0.0
        return (self.frame_count - 1) / span_s if span_s > 0 else 1.0


@contextmanager
def _translated(told: str) -> Iterator[None]:
    """Raise FFmpeg's errors as ours; `told` is said of all but a lack of memory, of which threads are made too."""
    try:
        yield
    except FFmpegError as error:
        if error.errno in (errno.ENOMEM, errno.EAGAIN):
            raise MediaTooLarge("Decoding the video takes more memory than is allowed.") from error
        raise MediaUnreadable(told) from error


def _converted(frame: AvFrame) -> Rgb:
    """Return a frame's pixels; raises `FFmpegError`."""
    try:
        rgb = frame.to_ndarray(format="rgb24", threads=1)
    except FFmpegError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        # A colour matrix that swscale does not know, as ICtCp. It is read as none, which is what decord does too.
        frame.colorspace = _NO_MATRIX
        rgb = frame.to_ndarray(format="rgb24", threads=1)
    return rgb.astype(np.uint8, copy=False)


def _video_of(container: InputContainer) -> VideoStream:
    """Return the first stream that is a video and no cover picture."""
    for stream in container.streams.video:
        if not stream.disposition & stream.disposition.attached_pic:
            break
    else:
        raise MediaUnreadable("The file has no video.")
    if stream.codec_context is None or stream.codec_context.name not in _CODECS:
        raise MediaUnreadable("The video has a coding that is not accepted.")
    if min(stream.codec_context.width, stream.codec_context.height) < 1:
        raise MediaUnreadable("The video has no size.")
    return stream


def _is_shown(codec: str, packet: memoryview) -> bool:
    # VP8 has packets that are only referred to; a bit of the first byte says so. No container does.
    return codec != "vp8" or bool(packet[0] & 0x10)


def _decoded(container: InputContainer, stream: VideoStream, runs: list[range]) -> Iterator[AvFrame]:
    """Yield what the decoder makes of some runs of packets, each on its own; damaged frames are left out."""
    context = stream.codec_context
    context.open(strict=False)  # here, where its errors are told: those of packets are not
    pending = iter(runs)
    run = next(pending)
    packets = (packet for packet in container.demux(stream) if packet.size)
    for position, packet in enumerate(packets):
        if position < run.start:
            continue
        yield from _sound(context, packet)
        if position == run.stop - 1:
            yield from _sound(context, None)
            context.flush_buffers()
            following = next(pending, None)
            if following is None:
                return
            run = following


def _sound(context: VideoCodecContext, packet: "av.Packet[VideoStream] | None") -> list[AvFrame]:
    try:
        return [frame for frame in context.decode(packet) if not frame.is_corrupt]
    except MemoryError:  # FFmpeg's own is one as well
        raise
    except FFmpegError:
        return []  # the frames beside it may be sound


def _turned(rgb: Rgb, matrix: np.ndarray) -> Rgb:
    """Return a picture as its display matrix wants it: turned by quarters, mirrored."""
    if len(matrix) < 5:
        return rgb
    a, b, c, d = (int(matrix[place]) for place in (0, 1, 3, 4))
    if abs(b) + abs(c) > abs(a) + abs(d):
        rgb, flip_x, flip_y = rgb.swapaxes(0, 1), c < 0, b < 0
    else:
        flip_x, flip_y = a < 0, d < 0
    return np.ascontiguousarray(rgb[:: -1 if flip_y else 1, :: -1 if flip_x else 1])
