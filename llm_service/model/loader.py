"""Loads a checkpoint's language model, and nothing else of the checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import nn

from llm_service.model.config import DecoderConfig, architecture_of, decoder_config
from llm_service.model.decoder import Decoder
from llm_service.model.head import PackedHead
from llm_service.model.names import FAMILIES, LLAMA, PREFIXES, shapes_of, weight_plan
from llm_service.model.placement import layer_of, place_layers, weight_sizes
from shared.checkpoint import Checkpoint, InternVLConfig, Naming
from shared.errors import CheckpointError
from shared.packed_linear import can_pack, pack_linears
from shared.quantize import ModelWeights, Quantization, Scheme, read_and_round, scheme_of
from shared.weights import WeightPlan, unclaimed

# Old files hold the rope's frequencies, which follow from config.json.
_NEEDLESS: Final = "rotary_emb.inv_freq"
_HEAD: Final = "head.weight"
# Packed for so many, matrices are as fast with one row and with hundreds; packed for one they are slower with all.
_PACKED_FOR_ROWS: Final = 16
_META: Final = torch.device("meta")


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

    Takes the memory of the weights and of some megabytes more; where they are quantized or packed, of a layer's largest
    matrix as well. Blocks for as long as the reading takes; logs progress.
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

    packing = _packing(decoder, settings, scheme, device_of)
    weights = ModelWeights(checkpoint, plan, shapes, settings.dtype, packing.device_of)
    kept = read_and_round(decoder, "layers", scheme, weights, "loading_language_model", packing.seen, packing.takers)
    for name, weight in kept:
        if not packing.has(name):
            _set(decoder, name, weight)
    return decoder.eval()


@dataclass(frozen=True, slots=True)
class _Packing:
    """Which of a decoder's matrices go elsewhere than into its parameters: the packed head's and those of `takers`."""

    head: PackedHead | None
    takers: Mapping[str, Callable[[torch.Tensor], None]]
    place_of: Callable[[str], torch.device]

    def has(self, name: str) -> bool:
        """Whether this is the packed head's matrix, which is taken in pieces."""
        return self.head is not None and name == _HEAD

    def seen(self, name: str, piece: torch.Tensor) -> None:
        """Pass on a piece of the head's matrix."""
        if self.head is not None and name == _HEAD:
            self.head.add_rows(piece)

    def device_of(self, name: str) -> torch.device:
        """Return where a weight is put together; for a matrix whose pieces were passed on, where there is no memory."""
        return _META if self.has(name) else self.place_of(name)


def _packing(
    decoder: Decoder, settings: LoadSettings, scheme: Scheme | None, device_of: Callable[[str], torch.device]
) -> _Packing:
    """Replace the layers that are faster packed: the head, and where nothing is quantized every other one."""
    if not can_pack(settings.device, settings.dtype):
        return _Packing(None, {}, device_of)
    head = PackedHead(decoder.config.hidden_size, decoder.config.vocab_size, _PACKED_FOR_ROWS)
    decoder.head = head
    if scheme is not None:
        return _Packing(head, {}, device_of)

    def chosen(name: str, linear: nn.Linear) -> bool:
        return can_pack(device_of(name), settings.dtype)

    return _Packing(head, pack_linears(decoder, _PACKED_FOR_ROWS, chosen), device_of)


def pack_decoder(decoder: Decoder) -> None:
    """Pack a decoder that is complete, matrix by matrix; one that cannot be packed here stays as it is."""
    weights = {name: weight for name, weight in decoder.named_parameters() if weight.ndim == 2}
    packing = _packing(decoder, LoadSettings(decoder.device, decoder.dtype), None, lambda name: decoder.device)
    for name, take in packing.takers.items():
        take(weights.pop(name))
    if packing.head is not None:
        packing.head.add_rows(weights[_HEAD])


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
