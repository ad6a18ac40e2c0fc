"""Chooses the grid of tiles that a picture is resized to, exactly as the model cards' code does."""

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from shared.checkpoint import InternVLConfig

# What happens to a picture before it is cut. "card": the model cards' `convert("RGB")`, so that EXIF orientation is
# ignored, transparency dropped and 16 bits are clipped to 8. "viewer": what a person sees who looks at the picture.
Policy = Literal["card", "viewer"]


@dataclass(frozen=True, slots=True)
class Grid:
    """How many tiles lie side by side and one below the other."""

    columns: int
    rows: int

    @property
    def tile_count(self) -> int:
        """Tiles of the grid, the thumbnail not counted."""
        return self.columns * self.rows


@dataclass(frozen=True, slots=True)
class TilingSpec:
    """How pictures become tiles. All of it is part of an embedding's identity; sizes in pixels."""

    tile_size: int
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    policy: Policy = "card"

    @classmethod
    def of(cls, config: InternVLConfig, policy: Policy = "card") -> "TilingSpec":
        """Return what the checkpoint asks for."""
        return cls(config.image_size, config.min_tiles, config.max_tiles, config.use_thumbnail, policy)

    def adjusted(self, max_tiles: int | None, thumbnail: bool | None) -> "TilingSpec":
        """Return the spec with what a request asks for instead; None leaves the checkpoint's value."""
        most = self.max_tiles if max_tiles is None else max_tiles
        with_thumbnail = self.thumbnail if thumbnail is None else thumbnail
        return replace(self, min_tiles=min(self.min_tiles, most), max_tiles=most, thumbnail=with_thumbnail)


def choose_grid(width: int, height: int, spec: TilingSpec) -> Grid:
    """Return the candidate grid whose aspect ratio is closest to the picture's.

    Among equally close ones a later candidate wins if the picture has more than half of that grid's pixels.
    """
    aspect_ratio = width / height
    best, best_difference = Grid(1, 1), math.inf
    for grid in _candidates(spec.min_tiles, spec.max_tiles):
        difference = abs(aspect_ratio - grid.columns / grid.rows)
        large_enough = width * height > 0.5 * spec.tile_size * spec.tile_size * grid.tile_count
        if difference < best_difference or (difference == best_difference and large_enough):
            best, best_difference = grid, difference
    return best


@cache
def _candidates(min_tiles: int, max_tiles: int) -> tuple[Grid, ...]:
    # Grids of equal size keep the order in which a set gives them back, as in the reference: the set has to hold plain
    # tuples and be filled in this nested order (it decides ties when min_tiles > 1).
    pairs = {
        (columns, rows)
        for most in range(min_tiles, max_tiles + 1)
        for columns in range(1, most + 1)
        for rows in range(1, most + 1)
        if min_tiles <= columns * rows <= max_tiles
    }
    return tuple(Grid(*pair) for pair in sorted(pairs, key=lambda pair: pair[0] * pair[1]))
