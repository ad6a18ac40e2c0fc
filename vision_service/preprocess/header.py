"""A picture's size as `preprocess` finds it, read from the first bytes of the file without decoding a pixel."""

import os
import zlib
from collections.abc import Iterator
from io import BytesIO
from typing import Final

from PIL import ExifTags, Image, ImageFile, PngImagePlugin, TiffImagePlugin

from shared.errors import MediaTooLarge, MediaUnreadable
from vision_service.preprocess.image import (
    BOMB_ERRORS,
    DECODER_ERRORS,
    FORMATS,
    pixels_to_decode,
    too_many_pixels,
    turn_of,
    unreadable,
)
from vision_service.preprocess.tiling import Policy

_QUARTER_TURNS: Final = frozenset(
    {
        Image.Transpose.TRANSPOSE,
        Image.Transpose.ROTATE_90,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_270,
    }
)
_ANY_FILE_BYTES: Final = 1 << 40
_PNG_SIGNATURE_BYTES: Final = 8
_PNG_PIXELS: Final = frozenset({b"IDAT", b"fdAT", b"acTL", b"fcTL", b"IEND"})
_WEBP_ORIENTATION: Final = {b"EXIF": "exif", b"XMP ": "xmp"}


def read_size(head: bytes, max_pixels: int, policy: Policy) -> tuple[int, int]:
    """Return width and height.

    A PNG or WebP may say behind its pixels that it has to be turned; under the policy "viewer" this counts only where
    `head` reaches so far. Raises `MediaUnreadable`, also where `head` ends within the header, and `MediaTooLarge`.
    """
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        width, height = _webp_size(head)
        if width * height > max_pixels:
            raise too_many_pixels(max_pixels)
        return _turned(width, height, _webp_metadata(head), policy)
    stream = _Head(head)
    try:
        with Image.open(stream, formats=FORMATS) as image:
            size = _size_of(image, head, max_pixels, policy)
    except BOMB_ERRORS:
        raise too_many_pixels(max_pixels) from None
    except MediaTooLarge:
        raise
    except MemoryError as error:
        raise MediaTooLarge("Reading the picture's header takes more memory than is allowed.") from error
    except DECODER_ERRORS as error:
        raise (_cut_short() if stream.ran_out else unreadable()) from error
    if stream.ran_out:  # and something may have been left out for it
        raise _cut_short()
    return size


class _Head(BytesIO):
    """The first bytes of a file, and whether more of them were asked for than there are."""

    ran_out = False

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        # The file goes on behind these bytes: who asks where it ends, as TIFF's reader does, is told of no bound.
        if whence == os.SEEK_END:
            return super().seek(_ANY_FILE_BYTES)
        return super().seek(offset, whence)

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        if size is None or size < 0 or len(content) < size:
            self.ran_out = True
        return content


def _size_of(image: ImageFile.ImageFile, head: bytes, max_pixels: int, policy: Policy) -> tuple[int, int]:
    if pixels_to_decode(image) > max_pixels:
        raise too_many_pixels(max_pixels)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return _tiff_size(image)
    metadata: Image.Image = image
    if isinstance(image, PngImagePlugin.PngImageFile) and policy == "viewer":
        metadata = _png_metadata(head)
    return _turned(*image.size, metadata, policy)


def _turned(width: int, height: int, metadata: Image.Image, policy: Policy) -> tuple[int, int]:
    turned = policy == "viewer" and turn_of(metadata) in _QUARTER_TURNS
    return (height, width) if turned else (width, height)


def _tiff_size(image: TiffImagePlugin.TiffImageFile) -> tuple[int, int]:
    # Pillow turns TIFFs by itself under both policies: at once by the tag, when they are decoded by what else says so.
    by_tag = image.tag_v2.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    turned = turn_of(image) in _QUARTER_TURNS and not by_tag
    return (image.height, image.width) if turned else image.size


def _png_metadata(head: bytes) -> Image.Image:
    """Return a picture that has what a PNG says in all its chunks but those of pixels."""
    chunks = b"".join(chunk for chunk in _png_chunks(head) if chunk[4:8] not in _PNG_PIXELS)
    no_pixels = bytes(4) + b"IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big")
    with Image.open(BytesIO(head[:_PNG_SIGNATURE_BYTES] + chunks + no_pixels), formats=["PNG"]) as image:
        return _with_metadata(image.info)


def _png_chunks(head: bytes) -> Iterator[bytes]:
    position = _PNG_SIGNATURE_BYTES
    while position + 12 <= len(head):
        end = position + 12 + int.from_bytes(head[position : position + 4], "big")
        if end > len(head):
            return
        yield head[position:end]
        position = end


def _webp_size(head: bytes) -> tuple[int, int]:
    """Return the size of the canvas; Pillow's own reader wants the whole file."""
    if len(head) < 30:
        raise _cut_short()
    match head[12:16]:
        case b"VP8X":
            return _number(head[24:27]) + 1, _number(head[27:30]) + 1
        case b"VP8L" if head[20] == 0x2F:
            bits = _number(head[21:25])
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 " if head[23:26] == b"\x9d\x01\x2a":
            return _number(head[26:28]) & 0x3FFF, _number(head[28:30]) & 0x3FFF
    raise unreadable()


def _webp_metadata(head: bytes) -> Image.Image:
    info: dict[str | tuple[int, int], bytes] = {}
    position = 12
    while position + 8 <= len(head):
        name, size = head[position : position + 4], _number(head[position + 4 : position + 8])
        content = head[position + 8 : position + 8 + size]
        if name in _WEBP_ORIENTATION and len(content) == size:
            info.setdefault(_WEBP_ORIENTATION[name], content)
        position += 8 + size + size % 2
    return _with_metadata(info)


def _with_metadata(info: dict[str | tuple[int, int], bytes]) -> Image.Image:
    image = Image.new("1", (1, 1))
    image.info.update(info)
    return image


def _number(little_endian: bytes) -> int:
    return int.from_bytes(little_endian, "little")


def _cut_short() -> MediaUnreadable:
    return MediaUnreadable("The picture's size is not within these bytes: send more of the file.")
