"""What is wrong with a checkpoint is said by name, and equal weights have equal fingerprints."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.checkpoint import Checkpoint, read_config
from shared.errors import CheckpointError
from vision_service.model.loader import LoadedTower, load_tower
from vision_service.model.tower import TowerConfig

TINY = Path(__file__).parents[1] / "golden/checkpoints/internvl3-8b-tiny"
QKV = "vision_model.encoder.layers.1.attn.qkv.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model", copy_function=shutil.copyfile))


def load(directory: Path) -> LoadedTower:
    config = TowerConfig.of(read_config(directory))
    return load_tower(Checkpoint(directory), config, torch.device("cpu"), torch.float32)


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")


def change_config(directory: Path, **values: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["vision_config"] |= values.pop("vision_config", {})
    (directory / "config.json").write_text(json.dumps(config | values))


def test_a_tower_is_ready_to_run_in_the_dtype_asked_for() -> None:
    config = TowerConfig.of(read_config(TINY))
    loaded = load_tower(Checkpoint(TINY), config, torch.device("cpu"), torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.tower.parameters()} == {torch.bfloat16}
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in loaded.tower.parameters())
    assert not loaded.tower.training
    assert loaded.num_parameters > 100_000


def test_a_missing_tensor_is_named(checkpoint: Path) -> None:
    change_weights(checkpoint, lambda weights: weights.pop(QKV))
    with pytest.raises(CheckpointError, match=QKV):
        load(checkpoint)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(checkpoint: Path) -> None:
    change_weights(checkpoint, lambda weights: weights.update({QKV: torch.zeros(3, 5)}))
    with pytest.raises(CheckpointError, match=rf"{QKV}.*\[3, 5\].*\[192, 64\]"):
        load(checkpoint)


def test_a_tensor_that_is_no_float_is_named(checkpoint: Path) -> None:
    change_weights(checkpoint, lambda weights: weights.update({QKV: torch.zeros(192, 64, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=f"{QKV}.*I8"):
        load(checkpoint)


def test_a_tensor_that_config_json_does_not_speak_of_is_named(checkpoint: Path) -> None:
    name = "vision_model.encoder.layers.0.attn.q_norm.weight"
    change_weights(checkpoint, lambda weights: weights.update({name: torch.zeros(64)}))
    with pytest.raises(CheckpointError, match=name):
        load(checkpoint)


def test_the_blocks_behind_the_selected_layer_are_not_needed(checkpoint: Path) -> None:
    change_config(checkpoint, select_layer=1)
    loaded = load(checkpoint)
    assert len(loaded.tower.vision_model.encoder.layers) == 1
    change_weights(checkpoint, lambda weights: weights.pop(QKV.replace("layers.1", "layers.2")))
    assert load(checkpoint).fingerprint == loaded.fingerprint


def test_a_shard_cut_short_is_named_with_a_tensor_it_lacks(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4000])
    with pytest.raises(CheckpointError, match=r"model.safetensors is cut short: tensor '"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"ps_version": "v9"}, "ps_version"),
        ({"downsample_ratio": 0.3}, "downsample_ratio"),
        ({"force_image_size": 50}, "image size"),
        ({"select_layer": 7}, "select_layer"),
        ({"vision_config": {"norm_type": "batch_norm"}}, "norm_type"),
        ({"vision_config": {"num_attention_heads": 5}}, "num_attention_heads"),
        ({"vision_config": {"qkv_bias": None, "layer_norm_eps": "tiny"}}, "wrong type"),
    ],
)
def test_a_setting_that_cannot_be_served_is_named(checkpoint: Path, values: dict[str, Any], named: str) -> None:
    change_config(checkpoint, **values)
    with pytest.raises(CheckpointError, match=named):
        load(checkpoint)


def test_a_setting_that_is_missing_is_named(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    del config["vision_config"]["norm_type"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="norm_type"):
        load(checkpoint)


def test_the_fingerprint_does_not_depend_on_shards_or_language_weights(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    names = sorted(name for name in weights if not name.startswith("language_model."))
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: weights[name] for name in held}, checkpoint / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load(checkpoint).fingerprint == load(TINY).fingerprint


def test_the_fingerprint_changes_with_a_weight_and_with_a_setting(checkpoint: Path) -> None:
    original = load(TINY).fingerprint
    change_config(checkpoint, select_layer=-2)
    other_setting = load(checkpoint).fingerprint
    change_config(checkpoint, select_layer=-1)
    change_weights(checkpoint, lambda weights: weights["mlp1.3.bias"].add_(1))
    assert len({original, other_setting, load(checkpoint).fingerprint}) == 3
