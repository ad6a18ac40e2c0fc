"""Loads a checkpoint's language model, and nothing else of the checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from llm_service.model.config import DecoderConfig, architecture_of, decoder_config
from llm_service.model.decoder import Decoder
from llm_service.model.names import FAMILIES, LLAMA, PREFIXES, shapes_of, weight_plan
from llm_service.model.placement import layer_of, place_layers, weight_sizes
from shared.checkpoint import Checkpoint, InternVLConfig, Naming
from shared.errors import CheckpointError
from shared.quantize import ModelWeights, Quantization, Scheme, read_and_round, scheme_of
from shared.weights import WeightPlan, unclaimed

# Old files hold the rope's frequencies, which follow from config.json.
_NEEDLESS = "rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """Where the model goes and in which element type.

    `device` takes the first and the last layer and all that is in none; others share the layers with `more_devices`, by
    the plan of `placement`. `quantization` is that of the layers' matrices; `dtype` is everything else's.
    """

    device: torch.device
    dtype: torch.dtype
    quantization: Quantization = "none"
    more_devices: tuple[torch.device, ...] = ()
    vit_shares_first: bool = False


def load_decoder(directory: Path, config: InternVLConfig, settings: LoadSettings) -> Decoder:
    """Return the language model of a checkpoint directory, or raise `CheckpointError` naming what is wrong.

    Takes the memory of the weights and of some megabytes more; where they are quantized, of the largest matrix as well.
    Blocks for as long as the reading takes; logs progress.
    """
    scheme = scheme_of(settings.quantization)
    decoder = empty_decoder(decoder_config(config.llm))
    checkpoint = Checkpoint(directory)
    shapes = shapes_of(decoder)
    plan = weight_plan(decoder.config, shapes, FAMILIES[architecture_of(config.llm)], checkpoint.naming)
    _refuse_unknown(checkpoint, plan)
    devices = _layer_devices(decoder.config, shapes, scheme, settings)

    def device_of(name: str) -> torch.device:
        layer = layer_of(name)
        return settings.device if layer is None else devices[layer]

    weights = ModelWeights(checkpoint, plan, shapes, settings.dtype, device_of)
    for name, weight in read_and_round(decoder, "layers", scheme, weights, "loading_language_model"):
        _set(decoder, name, weight)
    return decoder.eval()


def empty_decoder(config: DecoderConfig) -> Decoder:
    """Return a decoder whose weights have shapes and no memory."""
    with torch.device("meta"):
        return Decoder(config)


def tensor_targets(decoder: Decoder) -> Mapping[str, torch.Tensor]:
    """Return, for each tensor of the original layout, the part of the decoder's weights that takes it.

    The names are those of the Qwen2 and Llama families.
    """
    weights = dict(decoder.named_parameters())
    plan = weight_plan(decoder.config, shapes_of(decoder), LLAMA, Naming.ORIGINAL)
    return {
        part.name: weights[name].data[part.runs[0].start : part.runs[0].stop]
        for name, parts in plan.items()
        for part in parts
    }


def _layer_devices(
    config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]], scheme: Scheme | None, settings: LoadSettings
) -> tuple[torch.device, ...]:
    """Return the device of each layer."""
    if not settings.more_devices:
        return (settings.device,) * config.num_layers
    sizes = weight_sizes(shapes, config.num_layers, settings.dtype.itemsize, scheme)
    devices = (settings.device, *settings.more_devices)
    return place_layers(sizes, devices, vit_shares_first=settings.vit_shares_first)


def _set(decoder: Decoder, name: str, weight: torch.Tensor) -> None:
    """Put a complete weight into its place."""
    owner, _, attribute = name.rpartition(".")
    setattr(decoder.get_submodule(owner), attribute, nn.Parameter(weight, requires_grad=False))


def _refuse_unknown(checkpoint: Checkpoint, plan: WeightPlan) -> None:
    """Raise `CheckpointError` for a tensor that config.json does not speak of: leaving it out would change answers."""
    unknown = unclaimed(checkpoint, plan, PREFIXES[checkpoint.naming])
    for name in unknown:
        if not name.endswith(_NEEDLESS):
            raise CheckpointError(f"{checkpoint.directory}: config.json has no place for tensor {name!r}.")
