"""Grids, tiles and pixel values are those of the model cards' code, bit for bit (tests/golden/preprocess)."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vision_service.model.tower import pixel_values
from vision_service.preprocess.image import cut_tiles, preprocess, read_rgb
from vision_service.preprocess.tiling import Grid, TilingSpec, choose_grid

GOLDEN = Path(__file__).parents[1] / "golden"
PICTURES: list[dict[str, Any]] = json.loads((GOLDEN / "preprocess/preprocess.json").read_text())["images"]
MAX_PIXELS = 40_000_000


def content_of(name: str) -> bytes:
    return (GOLDEN / "images" / name).read_bytes()


def spec_of(run: dict[str, Any]) -> TilingSpec:
    return TilingSpec(run["image_size"], run["min_num"], run["max_num"], run["use_thumbnail"])


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.mark.parametrize("golden", PICTURES, ids=lambda golden: golden["file"])
def test_a_picture_decodes_to_the_cards_rgb(golden: dict[str, Any]) -> None:
    image = read_rgb(content_of(golden["file"]), MAX_PIXELS)
    assert list(image.size) == golden["size"]
    assert sha256(np.asarray(image)) == golden["rgb_sha256"]


@pytest.mark.parametrize("golden", PICTURES, ids=lambda golden: golden["file"])
def test_every_tile_and_pixel_value_is_the_cards(golden: dict[str, Any]) -> None:
    image = read_rgb(content_of(golden["file"]), MAX_PIXELS)
    for run in golden["runs"]:
        spec = spec_of(run)
        grid = choose_grid(image.width, image.height, spec)
        tiles = cut_tiles(image, grid, spec)
        values = pixel_values(torch.from_numpy(tiles.copy())).numpy()
        assert [grid.columns, grid.rows] == run["grid_cols_rows"]
        assert len(tiles) == run["n_tiles"]
        assert [sha256(tile) for tile in tiles] == run["tile_u8_sha256"]
        assert values.dtype == np.float32
        assert sha256(values) == run["pixel_values_sha256"]


def test_every_row_of_the_grid_table_is_chosen() -> None:
    table = json.loads(gzip.decompress((GOLDEN / "preprocess/tile_grid.json.gz").read_bytes()))
    wrong = []
    for width, height, min_num, max_num, image_size, columns, rows, num_tiles in table["rows"]:
        grid = choose_grid(width, height, TilingSpec(image_size, min_num, max_num, thumbnail=True))
        with_thumbnail = grid.tile_count + (grid.tile_count > 1)
        if (grid, with_thumbnail) != (Grid(columns, rows), num_tiles):
            wrong.append((width, height, min_num, max_num, grid))
    assert wrong == []


def test_stored_tiles_are_reproduced() -> None:
    with np.load(GOLDEN / "preprocess/tiles_u8_56.npz") as stored:
        for name in stored.files:
            picture = preprocess(content_of(name), TilingSpec(56, 1, 6, thumbnail=True), MAX_PIXELS)
            assert np.array_equal(picture.tiles, stored[name]), name
