"""From a medium's bytes to its tiles, in the worker processes of its kind."""

from dataclasses import dataclass

from shared.rpc.deadline import remaining_s
from vision_service.batcher import Deadline
from vision_service.preprocess.estimate import Estimate
from vision_service.preprocess.frames import VideoSpec
from vision_service.preprocess.image import Picture
from vision_service.preprocess.tiling import TilingSpec
from vision_service.workers.pool import MediaPool


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
    """Turns bytes into tiles, away from the event loop and from the service's memory."""

    def __init__(self, pictures: MediaPool, videos: MediaPool, tokens_per_tile: int) -> None:
        self._pictures = pictures
        self._videos = videos
        self._tokens_per_tile = tokens_per_tile

    async def start(self) -> None:
        """Start what decodes pictures, so that the first one does not wait for it; videos wait half a second."""
        await self._pictures.start()

    async def prepare(self, content: bytes, spec: MediaSpec, deadline: Deadline) -> Picture:
        """Return the tiles; raises what `MediaPool.prepare` raises."""
        pool = self._pictures if spec.video is None else self._videos
        return await pool.prepare(content, spec.tiling, spec.video, deadline)

    async def estimate(self, head: bytes, tiling: TilingSpec) -> Estimate:
        """Return what a picture will take, by the first bytes of its file, within the current call's deadline.

        Raises `MediaUnreadable`, also where more of the file is needed, `MediaTooLarge` and `DeadlineExceeded`.
        """
        return await self._pictures.estimate(head, tiling, self._tokens_per_tile, Deadline(remaining_s()))
