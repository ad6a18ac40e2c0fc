"""Turns the config.json of the `-hf` layout into the keys and values of the original layout."""

from collections.abc import Mapping
from typing import Any

from shared.errors import CheckpointError

# `model_type` of a text_config -> the architecture that the original layout names.
_ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "internlm3": "InternLM3ForCausalLM",
}


def original_form(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a config.json in the original layout's form; one that is in it already comes back as it is.

    Raises `KeyError` for a key that is missing, `CheckpointError` for a value that the original layout cannot say.

    What the `-hf` layout does not say is filled in as every released model has it: tiles from 1 to 12 with a thumbnail,
    and the template of the models that were released in it. A config.json may name another `template`, as one converted
    from InternVL2 has to.
    """
    if "text_config" not in raw:
        return raw
    if raw.get("vision_feature_select_strategy", "default") != "default":
        raise CheckpointError("config.json: only vision_feature_select_strategy 'default' is supported.")
    text = _text_config(raw["text_config"])
    phi3 = text["architectures"] == [_ARCHITECTURES["phi3"]]
    return {
        "vision_config": _vision_config(raw["vision_config"]),
        "llm_config": text,
        "downsample_ratio": raw["downsample_ratio"],
        "ps_version": "v2",
        "select_layer": raw["vision_feature_layer"],
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "use_thumbnail": True,
        "template": raw.get("template") or ("phi3-chat" if phi3 else "internvl2_5"),
        "system_message": raw.get("system_message"),
    }


def _text_config(text: Mapping[str, Any]) -> dict[str, Any]:
    architecture = next(iter(text.get("architectures") or ()), None) or _ARCHITECTURES.get(text["model_type"])
    return {**text, "architectures": [architecture or text["model_type"]]}


def _vision_config(vision: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **vision,
        "image_size": _side(vision["image_size"]),
        "patch_size": _side(vision["patch_size"]),
        "qkv_bias": vision["attention_bias"],
        "qk_normalization": vision["use_qk_norm"],
    }


def _side(size: Any) -> int:
    """Return the side of a square given as one number or as two."""
    sides = size if isinstance(size, list) else [size]
    if len(set(sides)) != 1:
        raise CheckpointError("config.json: tiles and patches have to be squares.")
    return int(sides[0])
