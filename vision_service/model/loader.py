"""Loads the vision side of a checkpoint: only its own tensors, checked by name and shape, with a fingerprint."""

import re
from dataclasses import dataclass

import torch
from blake3 import blake3
from torch import nn

from shared.checkpoint import Checkpoint
from shared.digest import digest_of_fields
from shared.errors import CheckpointError
from shared.packed_linear import can_pack, pack_linears
from shared.quantize import ModelWeights, Quantization, read_and_round, scheme_of
from shared.weights import WeightPlan, unclaimed
from vision_service.model.names import PREFIXES, weight_plan
from vision_service.model.tower import TowerConfig, VisionTower

_BLOCK = re.compile(r"\.encoder\.layers?\.(\d+)\.")


@dataclass(frozen=True, slots=True, eq=False)
class LoadedTower:
    """A tower ready to run. `fingerprint` names its weights as stored and the settings that decide its output."""

    tower: VisionTower
    fingerprint: str
    device: torch.device
    dtype: torch.dtype

    @property
    def num_parameters(self) -> int:
        """Numbers in all weights, in however many bits."""
        return sum(parameter.numel() for parameter in empty_tower(self.tower.config).parameters())


def load_tower(
    checkpoint: Checkpoint,
    config: TowerConfig,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization = "none",
) -> LoadedTower:
    """Read the tower onto `device` in `dtype`; raise `CheckpointError` naming a tensor that is missing or misshapen.

    `quantization` is that of the matrices of the vision transformer's blocks. Takes the memory of the weights and of
    some megabytes more, and where they are quantized or packed of the largest matrix as well. Blocks for as long as the
    reading takes; logs progress.
    """
    scheme = scheme_of(quantization)
    tower = empty_tower(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    plan = weight_plan(shapes, checkpoint.naming)
    _refuse_unknown(checkpoint, plan, config.vit.num_layers)
    prints = {name: _WeightPrint() for name in plan}

    def seen(name: str, piece: torch.Tensor) -> None:
        prints[name].add(piece)

    weights = ModelWeights(checkpoint, plan, shapes, dtype, lambda name: device)
    packs = pack_linears(tower, config.tokens_of_vit, _widens) if scheme is None and can_pack(device, dtype) else {}
    kept = read_and_round(tower, "vision_model.encoder", scheme, weights, "loading_vision_tower", seen, packs)
    tower.load_state_dict(dict(kept), assign=True)
    by_name = [field for name in sorted(prints) for field in (name, prints[name].value(shapes[name]))]
    fingerprint = digest_of_fields(repr(config), *by_name, *([scheme.identity] if scheme else []))
    return LoadedTower(tower.eval().requires_grad_(False), fingerprint, device, dtype)


def _widens(name: str, linear: nn.Linear) -> bool:
    """Return whether a layer is faster packed: with a tile's rows, torch is the faster one at those that narrow."""
    return linear.in_features <= linear.out_features


def empty_tower(config: TowerConfig) -> VisionTower:
    """Return a tower whose weights have shapes and no memory."""
    with torch.device("meta"):
        return VisionTower(config)


class _WeightPrint:
    """What a weight holds as stored. By weight and not by tensor: other shards and another layout change nothing."""

    def __init__(self) -> None:
        self._hash = blake3(max_threads=blake3.AUTO)
        self._types: dict[torch.dtype, None] = {}

    def add(self, piece: torch.Tensor) -> None:
        self._hash.update(piece.view(-1).view(torch.uint8).numpy().data)
        self._types[piece.dtype] = None

    def value(self, shape: tuple[int, ...]) -> bytes:
        return self._hash.digest() + f"{'+'.join(map(str, self._types))}{list(shape)}".encode()


def _refuse_unknown(checkpoint: Checkpoint, plan: WeightPlan, num_layers: int) -> None:
    """Raise `CheckpointError` for a tensor that config.json does not speak of: leaving it out would change answers.

    Blocks behind the last one that runs are left out on purpose.
    """
    for name in unclaimed(checkpoint, plan, PREFIXES[checkpoint.naming]):
        block = _BLOCK.search(name)
        if not block or int(block[1]) < num_layers:
            raise CheckpointError(f"{checkpoint.directory}: config.json has no place for tensor {name!r}.")
