"""Hidden states, shuffled patches and visual tokens are the reference's within 1e-4 (tests/golden/expected)."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from shared.checkpoint import Checkpoint, InternVLConfig, read_config
from tests.golden_cases import ALL_CHECKPOINTS, GOLDEN
from vision_service.model.loader import load_tower
from vision_service.model.projector import pixel_shuffle
from vision_service.model.tower import TowerConfig, VisionTower, pixel_values
from vision_service.preprocess.image import preprocess
from vision_service.preprocess.tiling import TilingSpec


@pytest.fixture(params=ALL_CHECKPOINTS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@cache
def config_of(name: str) -> InternVLConfig:
    return read_config(GOLDEN / "checkpoints" / name)


@cache
def expected_of(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "expected" / name / "vision_and_logits.safetensors")


def tower_of(name: str, dtype: torch.dtype = torch.float32, **changes: object) -> VisionTower:
    config = TowerConfig.of(replace(config_of(name), **changes))  # type: ignore[arg-type]
    return load_tower(Checkpoint(GOLDEN / "checkpoints" / name), config, torch.device("cpu"), dtype).tower


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0.0)


def test_hidden_states_of_every_depth(name: str) -> None:
    expected = expected_of(name)
    depths = [int(key.rpartition(".")[2]) for key in expected if key.startswith("vit.hidden_states.")]
    assert len(depths) == 3
    pixels = pixel_values(expected["pixel_u8_nhwc"])
    for depth in depths:
        features = tower_of(name, select_layer=depth).vision_model(pixels)
        assert_close(features, expected[f"vit.hidden_states.{depth}"])


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_pixel_shuffle_and_visual_tokens_of_both_versions(name: str, version: str) -> None:
    expected, tower = expected_of(name), tower_of(name, ps_version=version)
    features = tower.vision_model(pixel_values(expected["pixel_u8_nhwc"]))
    assert_close(pixel_shuffle(features[:, 1:], 2, version), expected[f"pixel_shuffle.{version}"])
    assert_close(tower(expected["pixel_u8_nhwc"]), expected[f"embeds.{version}"])


@pytest.mark.parametrize("select_layer", [-2, 1])
def test_visual_tokens_of_an_earlier_layer(name: str, select_layer: int) -> None:
    expected = expected_of(name)
    visual_tokens = tower_of(name, select_layer=select_layer)(expected["pixel_u8_nhwc"])
    assert_close(visual_tokens, expected[f"embeds.select_layer_{select_layer}"])


def test_positions_are_resampled_for_a_larger_input(name: str) -> None:
    side = config_of(name).image_size + 28
    pixels = torch.sin(0.01 * torch.arange(3 * side * side, dtype=torch.float64)).float().view(1, 3, side, side)
    assert_close(tower_of(name).embed(pixels), expected_of(name)["embeds.bigger_input"])


def test_bfloat16_stays_near_float32(name: str) -> None:
    expected = expected_of(name)
    visual_tokens = tower_of(name, dtype=torch.bfloat16)(expected["pixel_u8_nhwc"])
    assert visual_tokens.dtype == torch.bfloat16
    wanted = expected[f"embeds.{config_of(name).ps_version}"]
    assert torch.cosine_similarity(visual_tokens.float().flatten(), wanted.flatten(), dim=0) > 0.999


def test_a_picture_becomes_the_visual_tokens_that_the_reference_chats_with(name: str) -> None:
    cases = json.loads((GOLDEN / "expected" / name / "cases.json").read_text())["cases"]
    (image,) = next(case for case in cases if case["name"] == "single_image")["images"]
    spec = TilingSpec.of(config_of(name)).adjusted(image["max_num"], thumbnail=None)
    picture = preprocess((GOLDEN / "images" / image["file"]).read_bytes(), spec, 40_000_000)
    visual_tokens = tower_of(name)(torch.from_numpy(picture.tiles.copy()))
    assert_close(visual_tokens, expected_of(name)["single_image.visual_embeds"])
