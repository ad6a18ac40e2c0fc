"""What a worker answers to a task: tiles, an estimate, or one of the service's errors."""

import codecs
import traceback
import warnings
from importlib import import_module
from typing import Final

from PIL import Image

from shared.errors import MediaTooLarge, MediaUnreadable, ServiceError
from vision_service.preprocess.estimate import estimate
from vision_service.preprocess.frames import DecoderName
from vision_service.preprocess.image import preprocess
from vision_service.video.preparation import prepare, source_of
from vision_service.workers.channel import Header
from vision_service.workers.settings import PictureWork, VideoWork, Work
from vision_service.workers.task import (
    Estimation,
    Preparation,
    Task,
    header_of_estimate,
    header_of_picture,
    task_of,
)

Answer = tuple[Header, memoryview]
_NOTHING: Final = memoryview(b"")
# What libraries import when they first need it, which is too late for a process that may open no file.
_LATE_MODULES: Final = ("PIL.ImageCms", "PIL.ImageColor", "PIL.ImagePalette", "PIL.MpoImagePlugin", "PIL.TiffTags")
_LATE_MODULES_OF_DECODERS: Final[dict[DecoderName, tuple[str, ...]]] = {
    "pyav": (
        "av.audio.stream",
        "av.audio.codeccontext",
        "av.subtitles.stream",
        "av.subtitles.codeccontext",
        "av.video.stream",
        "av.video.codeccontext",
    ),
    "decord": (),
}
_LATE_CODECS: Final = ("ascii", "latin-1", "utf-8", "utf-16", "utf-16-be", "utf-16-le")


def load(work: Work) -> None:
    """Import all that the work will need."""
    warnings.simplefilter("ignore")  # of libraries, about what strangers send
    Image.preinit()
    modules: tuple[str, ...] = _LATE_MODULES
    if isinstance(work, VideoWork):
        source_of(work.decoder)
        modules += _LATE_MODULES_OF_DECODERS[work.decoder]
    for module in modules:
        import_module(module)
    for name in _LATE_CODECS:
        codecs.lookup(name)


def answer(work: Work, request: Header, content: bytes) -> Answer:
    """Return the answer to a request; what is wrong with the medium is an answer too."""
    task = task_of(request)  # what is wrong with this is our fault, and ends the process
    try:
        return _answered(work, task, content)
    except ServiceError as error:
        return _refusal(error)
    except MemoryError:
        return _refusal(MediaTooLarge(f"Decoding the {work.kind} takes more memory than is allowed."))
    except Exception:  # noqa: BLE001  # a decoder may raise anything about what strangers send
        traceback.print_exc()
        return _refusal(MediaUnreadable(f"The {work.kind} cannot be decoded."))


def _answered(work: Work, task: Task, content: bytes) -> Answer:
    match work, task:
        case PictureWork(max_pixels), Preparation(tiling, None):
            picture = preprocess(content, tiling, max_pixels)
        case PictureWork(max_pixels), Estimation(tiling, tokens_per_tile):
            return header_of_estimate(estimate(content, tiling, max_pixels, tokens_per_tile)), _NOTHING
        case VideoWork(decoder, limits), Preparation(tiling, video) if video is not None:
            picture = prepare(source_of(decoder)(content, limits), video, tiling, limits)
        case _:
            raise AssertionError("a task of another kind")
    return header_of_picture(picture), picture.tiles.data.cast("B")


def _refusal(error: ServiceError) -> Answer:
    return {"reason": error.reason, "message": error.message}, _NOTHING
