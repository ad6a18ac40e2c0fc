"""What a worker is asked to do with a medium and what it answers, as headers of messages, both ways."""

from dataclasses import asdict, dataclass

import numpy as np

from shared.embedding import VideoFrame
from vision_service.preprocess.estimate import Estimate
from vision_service.preprocess.frames import VideoSpec
from vision_service.preprocess.image import Picture
from vision_service.preprocess.tiling import Grid, TilingSpec
from vision_service.workers.channel import Header


@dataclass(frozen=True, slots=True)
class Preparation:
    """Make tiles of the medium; `video` is None for a picture."""

    tiling: TilingSpec
    video: VideoSpec | None = None


@dataclass(frozen=True, slots=True)
class Estimation:
    """Say what the picture will take; the medium may be no more than its first bytes."""

    tiling: TilingSpec
    tokens_per_tile: int


Task = Preparation | Estimation


def header_of_task(task: Task) -> Header:
    """Return the task as a header."""
    return asdict(task)


def task_of(header: Header) -> Task:
    """Return the task that `header_of_task` wrote."""
    tiling = TilingSpec(**header["tiling"])
    if "tokens_per_tile" in header:
        return Estimation(tiling, header["tokens_per_tile"])
    return Preparation(tiling, VideoSpec(**header["video"]) if header["video"] else None)


def header_of_picture(picture: Picture) -> Header:
    """Return all of a picture but its tiles, which are the message's content."""
    return {
        "width": picture.width,
        "height": picture.height,
        "columns": picture.grid.columns,
        "rows": picture.grid.rows,
        "frames": [[frame.index, frame.time_s] for frame in picture.frames],
    }


def picture_of(header: Header, content: memoryview, tiling: TilingSpec) -> Picture:
    """Return the picture of an answer; raises `KeyError`, `TypeError` or `ValueError` for what is none."""
    tiles = np.frombuffer(content, np.uint8).reshape(-1, tiling.tile_size, tiling.tile_size, 3)
    grid = Grid(int(header["columns"]), int(header["rows"]))
    frames = tuple(VideoFrame(int(index), float(time_s)) for index, time_s in header["frames"])
    per_frame = grid.tile_count + (1 if tiling.thumbnail and grid.tile_count > 1 else 0)
    if not 1 <= grid.tile_count <= tiling.max_tiles or len(tiles) != per_frame * (len(frames) or 1):
        raise ValueError("an answer of tiles that do not fit its grid")
    return Picture(int(header["width"]), int(header["height"]), grid, tiles, frames)


def header_of_estimate(estimate: Estimate) -> Header:
    """Return the estimate as a header."""
    return asdict(estimate)


def estimate_of(header: Header) -> Estimate:
    """Return the estimate of an answer; raises `KeyError`, `TypeError` or `ValueError` for what is none."""
    return Estimate(**{name: int(value) for name, value in header.items()})
