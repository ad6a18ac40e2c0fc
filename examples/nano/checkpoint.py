"""Writes checkpoint directories in the released layout: config.json, tokenizer files, safetensors in bfloat16."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from safetensors.torch import save_file

from examples.nano.model import Nano
from examples.nano.tokenizer import CHAT_TOKENS, write_tokenizer
from examples.nano.world import texts
from examples.nano.world.wording import SYSTEM_MESSAGE
from llm_service.model.loader import tensor_targets
from shared.checkpoint import SINGLE_FILE, InternVLConfig, read_config

TILE_SIZE: Final = 112
PATCH_SIZE: Final = 14
_TEXT_SEED, _TEXT_SITUATIONS = 20_260_101, 1000


@dataclass(frozen=True, slots=True)
class Shape:
    """How wide and deep the two halves are."""

    vision_width: int = 160
    vision_layers: int = 5
    vision_heads: int = 5
    language_width: int = 192
    language_layers: int = 5
    language_heads: int = 3
    language_mlp: int = 512


SHAPES: Final[Mapping[str, Shape]] = {
    "tiny": Shape(32, 1, 2, 32, 1, 2, 64),  # for tests
    "small": Shape(128, 4, 4, 192, 4, 3, 512),
    "base": Shape(),
    "large": Shape(language_width=256, language_layers=6, language_heads=4, language_mlp=704),
}


def write_description(directory: Path, shape: Shape) -> None:
    """Write everything but the weights. The same shape always gives the same files."""
    num_tokens = write_tokenizer(directory, texts(_TEXT_SEED, _TEXT_SITUATIONS), TILE_SIZE)
    added = json.loads((directory / "added_tokens.json").read_text(encoding="utf-8"))
    config = _config(shape, num_tokens, added[CHAT_TOKENS[2]])
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def config_of(directory: Path, shape: Shape) -> InternVLConfig:
    """Return the configuration of another shape with the tokenizer of a checkpoint directory."""
    stored = json.loads((directory / "config.json").read_text(encoding="utf-8"))["llm_config"]
    with TemporaryDirectory() as place:
        content = _config(shape, stored["vocab_size"], stored["eos_token_id"])
        (Path(place) / "config.json").write_text(json.dumps(content), encoding="utf-8")
        return read_config(Path(place))


def write_weights(directory: Path, model: Nano) -> None:
    """Write a model's weights, in bfloat16 and under the released names."""
    tensors = {**model.tower.state_dict(), **tensor_targets(model.decoder)}
    stored = {name: tensor.detach().to(torch.bfloat16).cpu().contiguous() for name, tensor in tensors.items()}
    beside = directory / f".{SINGLE_FILE}.new"
    save_file(stored, beside, metadata={"format": "pt"})
    beside.replace(directory / SINGLE_FILE)


def _config(shape: Shape, num_tokens: int, stop_id: int) -> dict[str, Any]:
    return {
        "architectures": ["InternVLChatModel"],
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": TILE_SIZE,
        "llm_config": _llm_config(shape, num_tokens, stop_id),
        "max_dynamic_patch": 4,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "system_message": SYSTEM_MESSAGE,
        "template": "internvl2_5",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": _vision_config(shape),
    }


def _llm_config(shape: Shape, num_tokens: int, stop_id: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "eos_token_id": stop_id,
        "hidden_act": "silu",
        "hidden_size": shape.language_width,
        "initializer_range": 0.02,
        "intermediate_size": shape.language_mlp,
        "max_position_embeddings": 4096,
        "model_type": "qwen2",
        "num_attention_heads": shape.language_heads,
        "num_hidden_layers": shape.language_layers,
        "num_key_value_heads": shape.language_heads,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": num_tokens,
    }


def _vision_config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["InternVisionModel"],
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": shape.vision_width,
        "image_size": TILE_SIZE,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * shape.vision_width,
        "layer_norm_eps": 1e-6,
        "model_type": "intern_vit_6b",
        "norm_type": "layer_norm",
        "num_attention_heads": shape.vision_heads,
        "num_channels": 3,
        "num_hidden_layers": shape.vision_layers,
        "patch_size": PATCH_SIZE,
        "qk_normalization": False,
        "qkv_bias": True,
        "torch_dtype": "bfloat16",
    }
