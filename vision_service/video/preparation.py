"""From a video's bytes to the tiles of the frames that are seen."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from shared.embedding import VideoFrame
from shared.errors import MediaTooLarge
from vision_service.preprocess.frames import DecoderName, VideoSpec, choose_frames
from vision_service.preprocess.image import Picture, Tiles, cut_tiles
from vision_service.preprocess.tiling import Grid, TilingSpec, choose_grid
from vision_service.video.source import DecodedFrame, Rgb, VideoLimits, VideoSource


def source_of(decoder: DecoderName) -> Callable[[bytes, VideoLimits], VideoSource]:
    """Return what opens videos by the decoder of that name, whose library is imported only here.

    What is returned raises `MediaUnreadable` and `MediaTooLarge`.
    """
    if decoder == "decord":
        from vision_service.video.decord import DecordSource

        return DecordSource
    from vision_service.video.pyav import PyAvSource

    return PyAvSource


def prepare(source: VideoSource, video: VideoSpec, tiling: TilingSpec, limits: VideoLimits) -> Picture:
    """Return the tiles of the frames that are seen; memory is needed for those and for one frame.

    All frames get the grid of the first one decoded. Raises what `VideoSource.frames` raises, `VideoRangeEmpty`, and
    `MediaTooLarge` where the frames have too many tiles together.
    """
    indices = choose_frames(source.frame_count, source.rate, video)
    sheet: _Sheet | None = None
    for frame in source.frames(indices):
        if sheet is None:
            sheet = _Sheet(frame.rgb, indices, tiling, limits)
        sheet.add(frame)
    assert sheet is not None
    return sheet.picture()


class _Sheet:
    """The tiles of all frames, filled in as frames come."""

    def __init__(self, rgb: Rgb, indices: Sequence[int], tiling: TilingSpec, limits: VideoLimits) -> None:
        self._indices, self._tiling = indices, tiling
        self._height, self._width = rgb.shape[:2]
        self._grid = choose_grid(self._width, self._height, tiling)
        self._places: defaultdict[int, list[int]] = defaultdict(list)
        for place, index in enumerate(indices):
            self._places[index].append(place)
        self._times_s: dict[int, float] = {}
        tiles = _tiles_per_frame(self._grid, tiling)
        if tiles * len(indices) > limits.max_tiles:
            raise MediaTooLarge(f"{len(indices)} frames of {tiles} tiles are more than {limits.max_tiles} tiles.")
        self._tiles: Tiles = np.empty((len(indices), tiles, tiling.tile_size, tiling.tile_size, 3), np.uint8)

    def add(self, frame: DecodedFrame) -> None:
        self._tiles[self._places[frame.index]] = cut_tiles(Image.fromarray(frame.rgb), self._grid, self._tiling)
        self._times_s[frame.index] = frame.time_s

    def picture(self) -> Picture:
        frames = tuple(VideoFrame(index, self._times_s[index]) for index in self._indices)
        tiles = self._tiles.reshape(-1, *self._tiles.shape[2:])
        return Picture(self._width, self._height, self._grid, tiles, frames)


def _tiles_per_frame(grid: Grid, tiling: TilingSpec) -> int:
    return grid.tile_count + (1 if tiling.thumbnail and grid.tile_count > 1 else 0)
