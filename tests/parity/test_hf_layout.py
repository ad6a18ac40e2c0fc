"""A checkpoint in the `-hf` layout, whatever its names and shards, is the model that it is in the original layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llm_service.model.decoder import Decoder
from llm_service.model.loader import LoadSettings, load_decoder
from llm_service.prompt.splice import PromptTokens
from shared.checkpoint import Checkpoint, Naming, read_config
from shared.errors import CheckpointError
from tests.golden_cases import ALL_CHECKPOINTS, GOLDEN
from tests.golden_models import CPU, prompt_logits
from tests.hf_checkpoints import ROWS, hf_config, write_hf
from vision_service.model.loader import LoadedTower, load_tower
from vision_service.model.tower import TowerConfig


def language_side(directory: Path) -> Decoder:
    return load_decoder(directory, read_config(directory), LoadSettings(CPU, torch.float32))


def vision_side(directory: Path) -> LoadedTower:
    return load_tower(Checkpoint(directory), TowerConfig.of(read_config(directory)), CPU, torch.float32)


def assert_equal(model: nn.Module, original: nn.Module) -> None:
    weights, expected = dict(model.named_parameters()), dict(original.named_parameters())
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []


@pytest.mark.parametrize("native", [True, False], ids=["native", "released"])
@pytest.mark.parametrize("checkpoint", ROWS)
def test_weights_shapes_and_fingerprint_are_those_of_the_original(
    checkpoint: str, native: bool, tmp_path: Path
) -> None:
    directory = write_hf(checkpoint, tmp_path / "model", native=native, shards=1 if native else 3)
    source = GOLDEN / "checkpoints" / checkpoint
    assert Checkpoint(directory).naming is (Naming.HF_NATIVE if native else Naming.HF)
    decoder, original = language_side(directory), language_side(source)
    assert decoder.config == original.config
    assert_equal(decoder, original)
    tower, expected = vision_side(directory), vision_side(source)
    assert_equal(tower.tower, expected.tower)
    assert tower.fingerprint == expected.fingerprint


def test_only_a_family_without_released_models_is_not_written_here() -> None:
    assert set(ALL_CHECKPOINTS) - ROWS.keys() == {"internlm3-tiny"}


@pytest.mark.parametrize(
    ("checkpoint", "template"),
    [("internvl3-8b-tiny", "internvl2_5"), ("internvl3-9b-tiny", "internvl2_5"), ("internvl2-4b-tiny", "phi3-chat")],
)
def test_what_the_file_does_not_say_is_as_in_the_released_models(
    checkpoint: str, template: str, tmp_path: Path
) -> None:
    directory = write_hf(checkpoint, tmp_path / "model", native=False)
    config, original = read_config(directory), read_config(GOLDEN / "checkpoints" / checkpoint)
    assert config.template == template
    for field in ("image_size", "patch_size", "tokens_per_tile", "hidden_size", "min_tiles", "max_tiles"):
        assert getattr(config, field) == getattr(original, field), field
    assert (config.use_thumbnail, config.select_layer, config.system_message) == (True, -1, None)


def test_a_template_that_the_file_names_is_taken(tmp_path: Path) -> None:
    directory = write_hf("internvl2-8b-tiny", tmp_path / "model", native=True)
    change(directory, template="internlm2-chat")
    assert read_config(directory).template == "internlm2-chat"


def change(directory: Path, **values: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    for key, value in values.items():
        if isinstance(value, dict):
            config[key] |= value
        else:
            config[key] = value
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ({"vision_config": {"image_size": [56, 112]}}, "squares"),
        ({"text_config": {"architectures": None, "model_type": "gpt2"}}, "gpt2"),
    ],
)
def test_what_the_original_layout_cannot_say_is_refused_by_name(
    values: dict[str, Any], named: str, tmp_path: Path
) -> None:
    directory = write_hf("internvl2-1b-tiny", tmp_path / "model", native=True)
    change(directory, **values)
    with pytest.raises(CheckpointError, match=named):
        language_side(directory)


@pytest.mark.parametrize("checkpoint", ["internvl3-8b-tiny", "internvl2-26b-tiny"])
def test_what_the_library_saves_is_served_and_computes_what_the_library_computes(
    checkpoint: str, tmp_path: Path
) -> None:
    """The library's own model of this layout, with random weights: its config.json, its names, its logits."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    raw = json.loads((GOLDEN / "checkpoints" / checkpoint / "config.json").read_text())
    described = hf_config(raw) | {"image_token_id": raw["llm_config"]["vocab_size"] - 1, "tie_word_embeddings": False}
    library = InternVLForConditionalGeneration(InternVLConfig(**described)).eval().float()
    generator = torch.Generator().manual_seed(7)
    for parameter in library.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    library.save_pretrained(tmp_path)

    tiles = torch.randn(2, 3, raw["force_image_size"], raw["force_image_size"], generator=generator)
    ids = tuple(range(1, 60))
    with torch.inference_mode():
        visual_tokens = vision_side(tmp_path).tower.embed(tiles)
        expected_tokens = library.get_image_features(tiles).pooler_output
        expected = library(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(visual_tokens, expected_tokens, atol=1e-4, rtol=1e-4)
    logits = prompt_logits(language_side(tmp_path), PromptTokens(ids))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
