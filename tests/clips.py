"""Clips with the frame's number drawn into every frame, in many codecs and containers: they tell which frame came.

The upper half of a frame holds the number's bits as light and dark blocks, most significant first; the lower half holds
the inverse. What is cut, turned, torn or blended of two frames therefore reads as no number at all.
"""

import io
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from typing import Any

import av
import numpy as np
import numpy.typing as npt

Frame = npt.NDArray[np.uint8]

BITS = 10
BLOCK = 16
WIDTH, HEIGHT = BITS * BLOCK, 96
RATE = 25


@dataclass(frozen=True)
class Clip:
    """How a clip is made. `numbers` are those of the frames a viewer is shown, `times_s` when."""

    container: str
    codec: str
    count: int = 60
    options: dict[str, str] = field(default_factory=dict)
    container_options: dict[str, str] = field(default_factory=dict)
    b_frames: int = 0
    pixel_format: str = "yuv420p"
    ticks: Sequence[int] | None = None
    rewrite: Callable[[bytes], bytes] = bytes
    first: int = 0
    size: tuple[int, int] = (WIDTH, HEIGHT)

    @property
    def numbers(self) -> list[int]:
        return list(range(self.first, self.count))

    @property
    def times_s(self) -> list[float]:
        ticks = self.ticks or range(self.count)
        return [(ticks[number] - ticks[self.first]) / RATE for number in self.numbers]


def frame_of(number: int, width: int = WIDTH, height: int = HEIGHT) -> Frame:
    """Return the frame [height, width, 3] that shows a number."""
    bits = np.array([(number >> shift) & 1 for shift in reversed(range(BITS))], bool)
    halves = np.stack((bits, ~bits))  # [2, bits]
    levels = np.where(halves, 235, 20).astype(np.uint8)
    large = levels.repeat(height // 2, axis=0).repeat(width // BITS, axis=1)
    return np.repeat(large[..., np.newaxis], 3, axis=2)


def number_of(frame: Frame) -> int | None:
    """Return the number that a decoded frame shows; None where it shows none."""
    height, width = frame.shape[:2]
    rows = [height // 4, height * 3 // 4]
    columns = [int((bit + 0.5) * width / BITS) for bit in range(BITS)]
    levels = frame.astype(int).mean(axis=2)[np.ix_(rows, columns)]
    if ((levels > 70) & (levels < 185)).any():
        return None
    bits, inverse = levels > 127
    if (bits == inverse).any():
        return None
    return int("".join(map(str, bits.astype(int))), 2)


@cache
def content_of(name: str) -> bytes:
    """Return the file of a clip of `CLIPS`."""
    return encode(CLIPS[name])


def encode(clip: Clip, frames: Sequence[Frame] | None = None) -> bytes:
    """Return the file of a clip, of other frames where some are given."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=clip.container, options=clip.container_options) as output:
        stream: Any = output.add_stream(clip.codec, rate=RATE, options=clip.options)
        stream.width, stream.height = clip.size
        stream.pix_fmt = clip.pixel_format
        stream.gop_size = 12
        stream.max_b_frames = clip.b_frames
        if clip.codec not in ("mpeg4", "mjpeg"):
            stream.codec_context.time_base = Fraction(1, RATE)
        for number in range(clip.count):
            rgb = frame_of(number, *clip.size) if frames is None else frames[number]
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts = clip.ticks[number] if clip.ticks else number
            frame.time_base = Fraction(1, RATE)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return clip.rewrite(buffer.getvalue())


def box_at(content: bytes, *path: bytes) -> tuple[int, int]:
    """Return where the body of an MP4 box begins and ends."""
    start, end = 0, len(content)
    for name in path:
        start, end = _child(content, start, end, name)
    return start, end


def _child(content: bytes, start: int, end: int, name: bytes) -> tuple[int, int]:
    while start + 8 <= end:
        size = int.from_bytes(content[start : start + 4], "big") or end - start
        if content[start + 4 : start + 8] == name:
            return start + 8, start + size
        start += size
    raise LookupError(name)


def with_matrix(*matrix: int) -> Callable[[bytes], bytes]:
    """Return what writes a display matrix (a, b, c, d) into an MP4's only track."""

    def rewrite(content: bytes) -> bytes:
        start, _ = box_at(content, b"moov", b"trak", b"tkhd")
        a, b, c, d = (value << 16 for value in matrix)
        written = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
        return content[: start + 40] + written + content[start + 76 :]

    return rewrite


def cut_before(frames: int) -> Callable[[bytes], bytes]:
    """Return what makes an MP4's edit list leave out the first frames, as cutting without encoding does."""

    def rewrite(content: bytes) -> bytes:
        start, _ = box_at(content, b"moov", b"trak", b"edts", b"elst")
        media, _ = box_at(content, b"moov", b"trak", b"mdia", b"mdhd")
        movie, _ = box_at(content, b"moov", b"mvhd")
        media_scale, movie_scale = (struct.unpack_from(">I", content, at + 12)[0] for at in (media, movie))
        duration, media_time = struct.unpack_from(">Ii", content, start + 8)
        entry = struct.pack(
            ">Ii", duration - frames * movie_scale // RATE, max(media_time, 0) + frames * media_scale // RATE
        )
        return content[: start + 8] + entry + content[start + 16 :]

    return rewrite


def _uneven(count: int) -> list[int]:
    ticks, at = [], 0
    for number in range(count):
        ticks.append(at)
        at += 1 + number % 4
    return ticks


_X264 = {"preset": "ultrafast", "crf": "23"}
_OPEN_GOP = "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0"
CLIPS: dict[str, Clip] = {
    "h264 mp4": Clip("mp4", "libx264", options=_X264),
    "h264 mp4 B-frames": Clip("mp4", "libx264", options=_X264 | {"x264-params": "bframes=3:b-adapt=0"}),
    "h264 mp4 open GOP": Clip("mp4", "libx264", options=_X264 | {"x264-params": _OPEN_GOP}),
    "h264 mp4 fragmented": Clip(
        "mp4",
        "libx264",
        options=_X264 | {"x264-params": "bframes=3:b-adapt=0"},
        container_options={"movflags": "frag_keyframe+empty_moov"},
    ),
    "h264 mp4 uneven times": Clip("mp4", "libx264", options=_X264 | {"x264-params": "bframes=2"}, ticks=_uneven(60)),
    "h264 mp4 cut": Clip(
        "mp4", "libx264", options=_X264 | {"x264-params": "bframes=3:b-adapt=0"}, rewrite=cut_before(17), first=17
    ),
    "h264 mov": Clip("mov", "libx264", options=_X264),
    "h264 mkv open GOP": Clip("matroska", "libx264", options=_X264 | {"x264-params": _OPEN_GOP}),
    "h264 mkv uneven times": Clip("matroska", "libx264", options=_X264, ticks=_uneven(60)),
    "h265 mp4": Clip(
        "mp4", "libx265", options={"preset": "ultrafast", "x265-params": "keyint=12:bframes=3:log-level=none"}
    ),
    "vp8 webm": Clip("webm", "libvpx", options={"auto-alt-ref": "1", "lag-in-frames": "10", "cpu-used": "8"}),
    "vp9 webm": Clip("webm", "libvpx-vp9", options={"lag-in-frames": "10", "cpu-used": "8", "deadline": "realtime"}),
    "av1 mp4": Clip(
        "mp4", "libsvtav1", options={"preset": "8", "crf": "1", "svtav1-params": "keyint=12:hierarchical-levels=2"}
    ),
    "mpeg4 avi": Clip("avi", "mpeg4", options={"qscale": "2"}),
    "mpeg4 avi B-frames": Clip("avi", "mpeg4", options={"qscale": "2"}, b_frames=2),
    "mpeg4 mp4 B-frames": Clip("mp4", "mpeg4", options={"qscale": "2"}, b_frames=2),
    "h264 avi B-frames": Clip("avi", "libx264", options=_X264 | {"x264-params": "bframes=3:b-adapt=0"}),
    "mjpeg avi": Clip("avi", "mjpeg", pixel_format="yuvj420p"),
}
# Colour matrices that FFmpeg's conversion to RGB does not know.
MATRICES = ("YCgCo", "bt2020c", "smpte2085", "chroma-derived-nc", "chroma-derived-c", "ICtCp")
CLIPS |= {
    f"h264 mp4 {matrix}": Clip("mp4", "libx264", 20, _X264 | {"x264-params": f"colormatrix={matrix}"})
    for matrix in MATRICES
}


def with_a_hidden_frame(content: bytes, number: int) -> bytes:
    """Return a VP8 file in which a frame is only referred to, never shown."""
    packet = packets_of(content)[number]
    return content.replace(packet, bytes([packet[0] & ~0x10]) + packet[1:])


def damaged(content: bytes, first: int) -> bytes:
    """Return an MP4 whose packets hold nothing of use from one on."""
    with av.open(io.BytesIO(content)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        places = [(packet.pos, packet.size) for packet in packets[first:]]
    for start, size in places:
        content = content[: start + 4] + bytes(size - 4) + content[start + size :]
    return content


def packets_of(content: bytes) -> list[bytes]:
    """Return the packets of a file's video, in the order they are decoded in."""
    with av.open(io.BytesIO(content)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def with_keyframes_at(content: bytes, *numbers: int) -> bytes:
    """Return an MP4 that calls other frames, equally many, its keyframes."""
    start, end = box_at(content, b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stss")
    table = struct.pack(f">{len(numbers)}I", *(number + 1 for number in numbers))
    assert len(table) == end - start - 8
    return content[: start + 8] + table + content[end:]


def claiming(content: bytes, frame_count: int) -> bytes:
    """Return an MP4 that says that it has so many frames, all of one size."""
    table = box_at(content, b"moov", b"trak", b"mdia", b"minf", b"stbl")
    times, _ = _child(content, *table, b"stts")
    sizes, _ = _child(content, *table, b"stsz")
    content = content[: times + 8] + struct.pack(">I", frame_count) + content[times + 12 :]
    return content[: sizes + 4] + struct.pack(">II", 100, frame_count) + content[sizes + 12 :]


def cover_only() -> bytes:
    """Return an MP4 whose only picture is a cover."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream: Any = output.add_stream("mjpeg", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        stream.disposition = stream.disposition.attached_pic
        frame = av.VideoFrame.from_ndarray(frame_of(1), format="rgb24")
        frame.pts = 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def sound_only() -> bytes:
    """Return an MP4 that has a sound track and no video."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream: Any = output.add_stream("aac", rate=16_000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        for position in range(4):
            frame.pts = 1024 * position
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()
