"""Each kind of medium goes to the workers of its kind, and an estimate to those of pictures."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shared.errors import DeadlineExceeded
from shared.rpc.deadline import adopt
from tests.clips import content_of
from tests.media_pools import NEVER, media_pool, video_work
from vision_service.preparer import MediaPreparer, MediaSpec
from vision_service.preprocess.estimate import Estimate
from vision_service.preprocess.frames import VideoSpec
from vision_service.preprocess.tiling import TilingSpec

PICTURE = (Path(__file__).parents[1] / "golden/images/rgb_landscape.png").read_bytes()
TILING = TilingSpec(28, 1, 12, thumbnail=True)


@asynccontextmanager
async def preparer() -> AsyncIterator[MediaPreparer]:
    async with media_pool() as pictures, media_pool(video_work()) as videos:
        yield MediaPreparer(pictures, videos, tokens_per_tile=4)


async def test_pictures_and_videos_become_tiles_and_an_estimate_promises_as_many() -> None:
    async with preparer() as at:
        await at.start()
        picture = await at.prepare(PICTURE, MediaSpec(TILING), NEVER)
        video = await at.prepare(content_of("h264 mp4"), MediaSpec(TILING, VideoSpec(3)), NEVER)
        estimate = await at.estimate(PICTURE[:200], TILING)
    assert len(video.frames) == 3
    tiles = len(picture.tiles)
    grid = picture.grid
    assert estimate == Estimate(picture.width, picture.height, grid.columns, grid.rows, tiles, 4 * tiles)


async def test_an_estimate_ends_with_its_callers_deadline() -> None:
    async with preparer() as at:
        adopt(0.0, "late")
        with pytest.raises(DeadlineExceeded):
            await at.estimate(PICTURE, TILING)
