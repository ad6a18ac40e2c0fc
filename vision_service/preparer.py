"""From a medium's bytes to its tiles: pictures on threads of this process, videos in processes of their own."""

from dataclasses import dataclass

from vision_service.batcher import Deadline
from vision_service.preprocess.frames import VideoSpec
from vision_service.preprocess.image import Picture, preprocess
from vision_service.preprocess.tiling import TilingSpec
from vision_service.runner import WorkerPool
from vision_service.video.pool import VideoPool


@dataclass(frozen=True, slots=True)
class MediaSpec:
    """How a medium becomes tiles; `video` is None for a picture. All of it is part of an embedding's identity."""

    tiling: TilingSpec
    video: VideoSpec | None = None

    @property
    def identity(self) -> tuple[str | int, ...]:
        """What names the spec within a digest."""
        tiling, video = self.tiling, self.video
        fields: tuple[str | int, ...] = (
            tiling.tile_size,
            tiling.min_tiles,
            tiling.max_tiles,
            int(tiling.thumbnail),
            tiling.policy,
        )
        if video is None:
            return fields
        return (*fields, "video", video.decoder, video.segment_count, repr(video.start_s), repr(video.end_s))


class MediaPreparer:
    """Turns bytes into tiles, away from the event loop."""

    def __init__(self, workers: WorkerPool, videos: VideoPool, max_pixels: int) -> None:
        self._workers = workers
        self._videos = videos
        self._max_pixels = max_pixels

    async def prepare(self, content: bytes, spec: MediaSpec, deadline: Deadline) -> Picture:
        """Return the tiles; raises what `preprocess` and `VideoPool.prepare` raise."""
        if spec.video is not None:
            return await self._videos.prepare(content, spec.video, spec.tiling, deadline)
        return await self._workers.run(preprocess, content, spec.tiling, self._max_pixels)
