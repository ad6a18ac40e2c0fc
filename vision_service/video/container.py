"""Recognizes the containers that videos are accepted in, and files that end before their container does."""

from typing import Literal

from shared.errors import MediaUnreadable

# The names of FFmpeg's demuxers.
Container = Literal["mov", "matroska", "avi"]

_MOV_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot"})
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_AVI_PADDING_BYTES = 1


def recognize(content: bytes) -> Container:
    """Return which container `content` is.

    Raises `MediaUnreadable` for any other and for one that is cut short, which decoders may not notice.
    """
    container: Container
    if content[4:8] in _MOV_BOXES:
        container, size = "mov", _mov_bytes(content)
    elif content[:4] == _EBML:
        container, size = "matroska", _matroska_bytes(content)
    elif content[:4] == b"RIFF" and content[8:12] == b"AVI ":
        container, size = "avi", int.from_bytes(content[4:8], "little") + 8 - _AVI_PADDING_BYTES
    else:
        raise MediaUnreadable("The bytes are no video in an accepted container (MP4, MOV, Matroska, WebM, AVI).")
    if size > len(content):
        raise MediaUnreadable("The video is cut short.")
    return container


def _mov_bytes(content: bytes) -> int:
    """Return where the last of the boxes ends, by what they say of themselves."""
    position = 0
    while position + 8 <= len(content):
        size = int.from_bytes(content[position : position + 4], "big")
        if size == 1:  # a 64-bit size follows
            size = int.from_bytes(content[position + 8 : position + 16], "big")
        if size < 8:  # reaches to the end of the file, or is no box
            break
        position += size
    return position


def _matroska_bytes(content: bytes) -> int:
    """Return where the segment ends, by its own size; 0 where that is unknown, as in recordings."""
    header_bytes, position = _vint(content, 4)
    position += header_bytes or 0
    if content[position : position + 4] != _SEGMENT:
        return 0
    segment_bytes, position = _vint(content, position + 4)
    return 0 if segment_bytes is None else position + segment_bytes


def _vint(content: bytes, position: int) -> tuple[int | None, int]:
    """Return an EBML size, None where all its bits are set, and the position behind it."""
    first = content[position] if position < len(content) else 0
    length = 9 - first.bit_length()
    bits = 7 * length
    value = int.from_bytes(content[position : position + length], "big") & ((1 << bits) - 1)
    return (None if value == (1 << bits) - 1 else value), position + length
