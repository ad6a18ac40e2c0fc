"""The grid of any picture lies within the limits, and the tiles cover the picture."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vision_service.preprocess.image import cut_tiles
from vision_service.preprocess.tiling import TilingSpec, choose_grid

sides = st.integers(1, 64) | st.sampled_from([447, 448, 449, 4000, 65_500])
limits = st.integers(1, 40)


@given(sides, sides, limits)
def test_a_grid_never_has_more_tiles_than_allowed(width: int, height: int, max_tiles: int) -> None:
    grid = choose_grid(width, height, TilingSpec(448, 1, max_tiles, thumbnail=True))
    assert 1 <= grid.tile_count <= max_tiles


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 12), st.booleans())
def test_tiles_put_side_by_side_are_the_stretched_picture(
    width: int, height: int, max_tiles: int, thumbnail: bool
) -> None:
    spec = TilingSpec(14, 1, max_tiles, thumbnail)
    noise = np.random.default_rng(width * 64 + height).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(noise)
    grid = choose_grid(width, height, spec)
    tiles = cut_tiles(image, grid, spec)
    assert len(tiles) == grid.tile_count + (thumbnail and grid.tile_count > 1)
    rows = tiles[: grid.tile_count].reshape(grid.rows, grid.columns, 14, 14, 3)
    rebuilt = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    stretched = image.resize((14 * grid.columns, 14 * grid.rows), Image.Resampling.BICUBIC)
    assert np.array_equal(rebuilt, np.asarray(stretched))
    if len(tiles) > grid.tile_count:
        assert np.array_equal(tiles[-1], np.asarray(image.resize((14, 14), Image.Resampling.BICUBIC)))


def test_a_request_changes_only_what_it_names() -> None:
    spec = TilingSpec(448, 1, 12, thumbnail=True)
    assert spec.adjusted(None, None) == spec
    assert spec.adjusted(3, None) == TilingSpec(448, 1, 3, thumbnail=True)
    assert spec.adjusted(None, thumbnail=False) == TilingSpec(448, 1, 12, thumbnail=False)
    assert TilingSpec(448, 4, 12, thumbnail=True).adjusted(2, None).min_tiles == 2
