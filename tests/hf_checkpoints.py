"""Writes golden checkpoints in the `-hf` layout: names from the golden table, config.json as released ones have it."""

import gzip
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.golden_cases import GOLDEN

# Golden checkpoint -> the released model whose tensors have its names.
ROWS = {
    "internvl2-1b-tiny": "InternVL2-1B",
    "internvl2-26b-tiny": "InternVL2-26B",
    "internvl2-40b-tiny": "InternVL2-40B",
    "internvl2-4b-tiny": "InternVL2-4B",
    "internvl2-8b-tiny": "InternVL2-8B",
    "internvl2-llama3-76b-tiny": "InternVL2-Llama3-76B",
    "internvl2_5-4b-tiny": "InternVL2_5-4B",
    "internvl3-78b-tiny": "InternVL3-78B",
    "internvl3-8b-tiny": "InternVL3-8B",
    "internvl3-9b-tiny": "InternVL3-9B",
}
_MODEL_TYPES = {
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
    "InternLM2ForCausalLM": "llama",
    "Phi3ForCausalLM": "phi3",
}


def write_hf(checkpoint: str, directory: Path, *, native: bool, shards: int = 1) -> Path:
    """Write a golden checkpoint; `native` names are the library's state dict's, others those of the repositories."""
    source = GOLDEN / "checkpoints" / checkpoint
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("model*", "config.json"))
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(hf_config(config)))
    tensors: dict[str, torch.Tensor] = {}
    names = _native_names(ROWS[checkpoint])
    for file in source.glob("model*.safetensors"):
        for name, tensor in load_file(file).items():
            tensors |= _split(name, tensor, names[name], config["llm_config"])
    if not native:
        tensors = {_released(name): tensor for name, tensor in tensors.items()}
    _save(tensors, directory, shards)
    return directory


def hf_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a config.json of the original layout becomes."""
    vision, llm = dict(config["vision_config"]), dict(config["llm_config"])
    architecture = llm["architectures"][0]
    llm["model_type"] = _MODEL_TYPES[architecture]
    if architecture == "InternLM2ForCausalLM":
        llm |= {"architectures": ["LlamaForCausalLM"], "attention_bias": llm.pop("bias")}
    vision |= {
        "architectures": ["InternVisionModel"],
        "attention_bias": vision.pop("qkv_bias"),
        "use_qk_norm": vision.pop("qk_normalization"),
        "image_size": [vision["image_size"]] * 2,
        "patch_size": [vision["patch_size"]] * 2,
        "layer_scale_init_value": 0.1,
        "model_type": "internvl_vision",
    }
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": config["downsample_ratio"],
        "image_seq_length": 4,
        "image_token_id": 1,
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        "text_config": llm,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.52.0.dev0",
        "vision_config": vision,
        "vision_feature_layer": config["select_layer"],
        "vision_feature_select_strategy": "default",
    }


@cache
def _native_names(row: str) -> dict[str, list[str]]:
    names: dict[str, dict[str, list[str]]] = json.loads(
        gzip.decompress((GOLDEN / "rows/native_names.json.gz").read_bytes())
    )
    return names[row]


def _split(name: str, tensor: torch.Tensor, natives: list[str], llm: dict[str, Any]) -> dict[str, torch.Tensor]:
    if len(natives) == 1:
        return {natives[0]: tensor}
    order = [next(native for native in natives if f".{part}_proj." in native) for part in "qkv"]
    if name.startswith("vision_model."):
        return dict(zip(order, tensor.chunk(3), strict=True))
    heads, groups = llm["num_attention_heads"], llm["num_key_value_heads"]
    grouped = tensor.unflatten(0, (groups, heads // groups + 2, -1))  # [groups, queries + 2, head size, hidden]
    parts = (grouped[:, :-2].flatten(0, 2), grouped[:, -2].flatten(0, 1), grouped[:, -1].flatten(0, 1))
    return dict(zip(order, parts, strict=True))


def _released(native: str) -> str:
    if native.startswith("model.language_model."):
        return native.replace("model.language_model.", "language_model.model.", 1)
    return f"language_model.{native}" if native.startswith("lm_head.") else native.removeprefix("model.")


def _save(tensors: dict[str, torch.Tensor], directory: Path, shards: int) -> None:
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(stored, directory / "model.safetensors")
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        own = sorted(stored)[shard::shards]
        save_file({name: stored[name] for name in own}, directory / file)
        weight_map |= dict.fromkeys(own, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
