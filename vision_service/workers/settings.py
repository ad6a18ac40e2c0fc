"""What the worker processes of one kind do and may do, as the service tells it to them."""

import json
from dataclasses import asdict, dataclass
from typing import Literal

from vision_service.preprocess.frames import DecoderName
from vision_service.video.source import VideoLimits

Kind = Literal["picture", "video"]


@dataclass(frozen=True, slots=True)
class PictureWork:
    """Decode pictures of at most so many pixels."""

    max_pixels: int
    kind: Kind = "picture"


@dataclass(frozen=True, slots=True)
class VideoWork:
    """Decode videos with one decoder, within limits."""

    decoder: DecoderName
    limits: VideoLimits
    kind: Kind = "video"


Work = PictureWork | VideoWork


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """The work, and what limits a process.

    Seconds per medium, bytes of address space, media after which the process is replaced (decoders leak), and seconds
    from its start to its first medium.
    """

    work: Work
    timeout_s: float
    memory_bytes: int
    max_media: int
    start_timeout_s: float = 60.0

    def to_json(self) -> str:
        """Return the settings as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "WorkerSettings":
        """Return the settings that `to_json` wrote."""
        fields = json.loads(text)
        return cls(**fields | {"work": _work_of(fields["work"])})


def _work_of(fields: dict[str, object]) -> Work:
    if fields["kind"] == "picture":
        return PictureWork(**fields)  # type: ignore[arg-type]  # as `to_json` wrote them
    return VideoWork(**fields | {"limits": VideoLimits(**fields["limits"])})  # type: ignore[arg-type]
