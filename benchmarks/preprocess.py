"""Measures how pictures become tiles beside the model cards' own steps: `python -m benchmarks.preprocess`.

Every round does both, in turns, on the same picture: the cards' steps in this process, ours through the pool of worker
processes as the service has it, and ours within this process, which leaves out what the processes cost. "Four at once"
are four pictures that come together. What comes out is compared bit for bit first.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from vision_service.batcher import Deadline
from vision_service.model.tower import pixel_values
from vision_service.preprocess.image import Tiles, preprocess
from vision_service.preprocess.tiling import TilingSpec, choose_grid
from vision_service.workers.pool import MediaPool
from vision_service.workers.settings import PictureWork, WorkerSettings

SPEC: Final = TilingSpec(448, 1, 12, thumbnail=True)
SIZES: Final = ((4000, 3000), (1344, 896), (448, 448))
MAX_PIXELS: Final = 40_000_000
_TOGETHER: Final = 4
_MEAN, _STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
Work = Callable[[bytes], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Samples:
    """Milliseconds of one way of doing one thing, one per round."""

    name: str
    work: Work
    times_ms: list[float] = field(default_factory=list)

    async def take(self, content: bytes) -> None:
        """Do it once."""
        started = time.perf_counter()
        result = await self.work(content)
        self.times_ms.append((time.perf_counter() - started) * 1e3)
        del result


def photograph(width: int, height: int) -> bytes:
    """Return a JPEG of waves and a little noise, about as many bytes as a photograph has."""
    random = np.random.default_rng(width)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = np.stack([127 + 100 * np.sin(x / 40 + 2 * band) * np.cos(y / (60 + 11 * band)) for band in range(3)], -1)
    levels = np.clip(waves + random.normal(0, 6, waves.shape), 0, 255).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(levels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def card_tiles(content: bytes) -> list[Image.Image]:
    """Return the tiles as the model cards' `load_image` and `dynamic_preprocess` cut them."""
    image = Image.open(BytesIO(content)).convert("RGB")
    grid = choose_grid(image.width, image.height, SPEC)
    size = SPEC.tile_size
    stretched = image.resize((size * grid.columns, size * grid.rows), Image.Resampling.BICUBIC)
    corners = [(size * column, size * row) for row in range(grid.rows) for column in range(grid.columns)]
    tiles = [stretched.crop((left, top, left + size, top + size)) for left, top in corners]
    return [*tiles, image.resize((size, size), Image.Resampling.BICUBIC)] if len(tiles) > 1 else tiles


def card_values(content: bytes) -> torch.Tensor:
    """Return what the cards' transform makes of the tiles: Resize, ToTensor, Normalize, and all of them stacked."""
    return torch.stack([_transformed(tile) for tile in card_tiles(content)])


def _transformed(tile: Image.Image) -> torch.Tensor:
    resized = tile.convert("RGB").resize((SPEC.tile_size, SPEC.tile_size), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous().float().div(255)
    return values.sub_(_MEAN[:, None, None]).div_(_STD[:, None, None])


class Ours:
    """The service's way, from bytes to tiles and to pixel values."""

    def __init__(self, pool: MediaPool) -> None:
        self._pool = pool

    async def tiles(self, content: bytes) -> Tiles:
        """Return the tiles, cut by a worker process."""
        return (await self._pool.prepare(content, SPEC, None, Deadline(None))).tiles

    async def values(self, content: bytes) -> torch.Tensor:
        """Return the pixel values; on a GPU they are looked up there."""
        return pixel_values(torch.from_numpy(await self.tiles(content)))


async def _card_tiles(content: bytes) -> object:
    return card_tiles(content)


async def _card_values(content: bytes) -> object:
    return card_values(content)


async def _in_process(content: bytes) -> object:
    return preprocess(content, SPEC, MAX_PIXELS)


def together(work: Work) -> Work:
    """Return the work done for several pictures that come at the same time."""

    async def all_of_them(content: bytes) -> object:
        return await asyncio.gather(*(work(content) for _ in range(_TOGETHER)))

    return all_of_them


async def measure(ours: Ours, content: bytes, rounds: int) -> list[tuple[str, list[Samples]]]:
    """Return what every way took, the cards' first, after a check that all give the same."""
    assert torch.equal(await ours.values(content), card_values(content))
    contests = [
        ("tiles", [Samples("card", _card_tiles), Samples("pool", ours.tiles), Samples("in process", _in_process)]),
        ("pixel values", [Samples("card", _card_values), Samples("pool", ours.values)]),
        ("four at once", [Samples("card", together(_card_tiles)), Samples("pool", together(ours.tiles))]),
    ]
    for _ in range(rounds):
        for _, ways in contests:
            for samples in ways:
                await samples.take(content)
    return contests


def report(what: str, ways: Sequence[Samples]) -> list[dict[str, Any]]:
    """Print a line per way and return the figures; a ratio is the median of those of the rounds."""
    card, figures = ways[0].times_ms, []
    for samples in ways:
        ratios = [theirs / own for theirs, own in zip(card, samples.times_ms, strict=True)]
        low, median, high = min(samples.times_ms), statistics.median(samples.times_ms), max(samples.times_ms)
        print(f"{what:28} {samples.name:12} {median:8.1f} ms [{low:.1f}-{high:.1f}]  x{statistics.median(ratios):.2f}")
        figures.append({"what": what, "way": samples.name, "times_ms": samples.times_ms, "ratios": ratios})
    return figures


async def run(rounds: int, processes: int, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Measure and report for all sizes."""
    settings = WorkerSettings(PictureWork(MAX_PIXELS), timeout_s=60, memory_bytes=2 << 30, max_media=100_000)
    pool = MediaPool(settings, processes)
    try:
        await pool.start()
        figures = []
        for width, height in sizes:
            content = photograph(width, height)
            for what, ways in await measure(Ours(pool), content, rounds if width > 448 else 4 * rounds):
                figures += report(f"{width}x{height} {what}", ways)
        return figures
    finally:
        pool.close()


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processes", type=int, default=2, help="worker processes, as --picture-processes")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    figures = asyncio.run(run(arguments.rounds, arguments.processes, SIZES))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
