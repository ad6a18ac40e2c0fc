"""`python -m vision_service.video.worker SETTINGS`: decodes the videos that come on its standard input, one by one.

A process of its own, because decoders are large programs in C that read what strangers send: one that crashes, hangs or
wants too much memory ends here. It inherits no secrets and ends when its input ends.
"""

import json
import os
import resource
import signal
import sys
import traceback
from typing import Any, BinaryIO, Final

from shared.errors import MediaTooLarge, MediaUnreadable, ServiceError
from vision_service.preprocess.frames import VideoSpec
from vision_service.preprocess.tiling import TilingSpec
from vision_service.video.messages import Header, read_message, write_message
from vision_service.video.preparation import prepare, source_of
from vision_service.video.source import VideoLimits

# The service ends a worker that is late. This ends one whose service has gone in the meantime.
_ORPHAN_S: Final = 10.0


def main() -> None:
    """Answer requests until there are no more."""
    settings = json.loads(sys.argv[1])
    requests, answers = _channels()
    _confine(settings["memory_bytes"])
    limits = VideoLimits(**settings["limits"])
    source_of(settings["decoder"])  # loaded before the first video waits for it
    write_message(answers, {"ready": True})
    while True:
        try:
            header, content = read_message(requests)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, settings["timeout_s"] + _ORPHAN_S)
        write_message(answers, *_answer(header, content, limits))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _channels() -> tuple[BinaryIO, BinaryIO]:
    """Return where requests come from and answers go; what libraries print then goes nowhere."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, sys.stdout.fileno())
    return sys.stdin.buffer, answers


def _confine(memory_bytes: int) -> None:
    for limit, value in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CORE, 0)):
        _, most = resource.getrlimit(limit)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(limit, (value, value))


def _answer(header: Header, content: bytearray, limits: VideoLimits) -> tuple[Header, memoryview]:
    # What is wrong with these is our fault, and ends the process.
    video, tiling = VideoSpec(**header["video"]), TilingSpec(**header["tiling"])
    try:
        return _prepared(video, tiling, bytes(content), limits)
    except ServiceError as error:
        return _refusal(error)
    except MemoryError:
        return _refusal(MediaTooLarge("Decoding the video takes more memory than is allowed."))
    except Exception:  # noqa: BLE001  # a decoder may raise anything about what strangers send
        traceback.print_exc()
        return _refusal(MediaUnreadable("The video cannot be decoded."))


def _prepared(
    video: VideoSpec, tiling: TilingSpec, content: bytes, limits: VideoLimits
) -> tuple[dict[str, Any], memoryview]:
    picture = prepare(source_of(video.decoder)(content, limits), video, tiling, limits)
    header = {
        "width": picture.width,
        "height": picture.height,
        "columns": picture.grid.columns,
        "rows": picture.grid.rows,
        "frames": [[frame.index, frame.time_s] for frame in picture.frames],
    }
    return header, picture.tiles.data.cast("B")


def _refusal(error: ServiceError) -> tuple[Header, memoryview]:
    return {"reason": error.reason, "message": error.message}, memoryview(b"")


if __name__ == "__main__":
    main()
