"""Loads a checkpoint's language model, and nothing else of the checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from llm_service.model.config import DecoderConfig, decoder_config
from llm_service.model.decoder import Decoder
from shared.checkpoint import Checkpoint, InternVLConfig
from shared.errors import CheckpointError
from shared.progress import ProgressLog

_PREFIX = "language_model."


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """Where the model goes and in which element type."""

    device: torch.device
    dtype: torch.dtype


def load_decoder(directory: Path, config: InternVLConfig, settings: LoadSettings) -> Decoder:
    """Return the language model of a checkpoint directory, or raise `CheckpointError` naming what is wrong."""
    decoder = _empty_decoder(decoder_config(config.llm), settings)
    targets = tensor_targets(decoder)
    progress = ProgressLog("loading_language_model")
    for name, tensor in Checkpoint(directory).load(targets, progress):
        target = targets[name]
        if tensor.shape != target.shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(tensor.shape)}, config.json asks for {list(target.shape)}."
            )
        target.copy_(tensor)
    return decoder.eval()


def tensor_targets(decoder: Decoder) -> Mapping[str, torch.Tensor]:
    """Return, for each tensor of the original layout, the part of the decoder's weights that takes it."""
    config = decoder.config
    targets = {
        "model.embed_tokens.weight": decoder.embed.weight,
        "model.norm.weight": decoder.norm.weight,
        "lm_head.weight": decoder.head.weight,
    }
    for index, layer in enumerate(decoder.layers):
        prefix = f"model.layers.{index}."
        targets |= {prefix + name: target for name, target in _layer_targets(layer, config).items()}
    return {_PREFIX + name: target.data for name, target in targets.items()}


def _layer_targets(layer: torch.nn.Module, config: DecoderConfig) -> dict[str, torch.Tensor]:
    parts = dict(layer.named_parameters())
    gate, up = parts["mlp.gate_up.weight"].chunk(2)
    targets = {
        "input_layernorm.weight": parts["attention_norm.weight"],
        "post_attention_layernorm.weight": parts["mlp_norm.weight"],
        "self_attn.o_proj.weight": parts["attention.out.weight"],
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": parts["mlp.down.weight"],
    }
    for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
        split = torch.split(parts[f"attention.qkv.{kind}"], list(config.qkv_rows))
        targets |= {f"self_attn.{name}_proj.{kind}": part for name, part in zip("qkv", split, strict=True)}
    return targets


def _empty_decoder(config: DecoderConfig, settings: LoadSettings) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(config)
    return decoder.to(settings.dtype).to_empty(device=settings.device)
