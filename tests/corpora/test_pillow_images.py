"""Every picture of Pillow's own tests is decoded as it is without a worker, or refused in our words."""

import asyncio
import hashlib
from collections import Counter
from pathlib import Path

import pytest

from shared.errors import MediaTooLarge, MediaUnreadable
from tests.corpora.pillow_images import CorpusMissing, pillow_images
from tests.media_pools import NEVER, media_pool, picture_work
from vision_service.preprocess.image import Picture, preprocess
from vision_service.preprocess.tiling import TilingSpec
from vision_service.workers.pool import MediaPool

SPEC = TilingSpec(56, 1, 6, thumbnail=True)
MAX_PIXELS = 40_000_000


@pytest.fixture(scope="module")
def images() -> list[Path]:
    try:
        found = pillow_images()
    except CorpusMissing as missing:
        pytest.skip(str(missing))
    assert len(found) > 900
    return found


def summary_of(picture: Picture) -> str:
    return f"{picture.width}x{picture.height} {picture.grid} {hashlib.sha256(picture.tiles).hexdigest()}"


def outcome_here(content: bytes) -> str:
    try:
        return summary_of(preprocess(content, SPEC, MAX_PIXELS))
    except (MediaUnreadable, MediaTooLarge) as error:
        return error.reason


async def outcome_in_worker(at: MediaPool, content: bytes) -> str:
    try:
        return summary_of(await at.prepare(content, SPEC, None, NEVER))
    except (MediaUnreadable, MediaTooLarge) as error:
        return error.reason


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.filterwarnings("ignore")
async def test_pillows_own_corpus_harms_nothing(images: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    outcomes: Counter[str] = Counter()
    seen: set[int] = set()
    async with media_pool(picture_work(MAX_PIXELS), processes=2, memory_bytes=2 << 30, max_media=10_000) as at:
        await at.start()
        before = resident_bytes()
        for start in range(0, len(images), 2):
            contents = [path.read_bytes() for path in images[start : start + 2]]
            seen |= {worker._process.pid for worker in at._workers}
            found = await asyncio.gather(*(outcome_in_worker(at, content) for content in contents))
            for path, content, outcome in zip(images[start : start + 2], contents, found, strict=True):
                assert outcome == outcome_here(content), path.name
                outcomes[outcome if outcome.startswith("MEDIA_") else "decoded"] += 1
        grown = resident_bytes() - before
    killed = len(seen) - 2
    with capsys.disabled():
        print(f"\nPillow's corpus: {dict(outcomes)}, workers replaced: {killed}, grown by {grown >> 20} MiB")
    assert outcomes["decoded"] > 600
    assert killed == 0
    assert grown < 300 << 20
