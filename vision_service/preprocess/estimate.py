"""What a picture will take, in tiles and visual tokens, by the first bytes of its file."""

from dataclasses import dataclass

from vision_service.preprocess.header import read_size
from vision_service.preprocess.tiling import TilingSpec, choose_grid


@dataclass(frozen=True, slots=True)
class Estimate:
    """Sizes in pixels; `tile_count` includes the thumbnail."""

    width: int
    height: int
    columns: int
    rows: int
    tile_count: int
    token_count: int


def estimate(head: bytes, spec: TilingSpec, max_pixels: int, tokens_per_tile: int) -> Estimate:
    """Return what `preprocess` would make of the picture, if it is whole; nothing is decoded.

    Raises `MediaUnreadable`, also where more of the file is needed, and `MediaTooLarge`.
    """
    width, height = read_size(head, max_pixels, spec.policy)
    grid = choose_grid(width, height, spec)
    tile_count = grid.tile_count + (1 if spec.thumbnail and grid.tile_count > 1 else 0)
    return Estimate(width, height, grid.columns, grid.rows, tile_count, tile_count * tokens_per_tile)
