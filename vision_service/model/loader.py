"""Loads the vision side of a checkpoint: only its own tensors, checked by name and shape, with a fingerprint."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from blake3 import blake3

from shared.checkpoint import Checkpoint
from shared.digest import digest_of_fields
from shared.errors import CheckpointError
from shared.progress import ProgressLog
from vision_service.model.tower import TowerConfig, VisionTower

_DATA_TYPES = frozenset({"F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True, eq=False)
class LoadedTower:
    """A tower ready to run. `fingerprint` names its weights as stored and the settings that decide its output."""

    tower: VisionTower
    fingerprint: str
    device: torch.device
    dtype: torch.dtype

    @property
    def num_parameters(self) -> int:
        """Numbers in all weights."""
        return sum(parameter.numel() for parameter in self.tower.parameters())


def load_tower(checkpoint: Checkpoint, config: TowerConfig, device: torch.device, dtype: torch.dtype) -> LoadedTower:
    """Read the tower onto `device` in `dtype`; raise `CheckpointError` naming a tensor that is missing or misshapen.

    Blocks for as long as the reading takes; logs its progress.
    """
    with torch.device("meta"):
        tower = VisionTower(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    _check(checkpoint, shapes)
    weights: dict[str, torch.Tensor] = {}
    prints: dict[str, bytes] = {}
    for name, tensor in checkpoint.load(shapes, ProgressLog("loading_vision_tower")):
        prints[name] = _print_of(tensor)
        # A copy: what safetensors returns may be the mapped file, which somebody could replace under us.
        weights[name] = tensor.to(device=device, dtype=dtype, copy=True)
    tower.load_state_dict(weights, assign=True)
    return LoadedTower(tower.eval().requires_grad_(False), _fingerprint(config, prints), device, dtype)


def _check(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    checkpoint.require(shapes)
    for name, shape in shapes.items():
        entry = checkpoint.entries[name]
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.file}: tensor {name!r} has the shape {list(entry.shape)}, config.json asks for {list(shape)}."
            )
        if entry.data_type not in _DATA_TYPES:
            raise CheckpointError(f"{entry.file}: tensor {name!r} has the element type {entry.data_type}, not a float.")


def _print_of(tensor: torch.Tensor) -> bytes:
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return blake3(content.data, max_threads=blake3.AUTO).digest() + f"{tensor.dtype}{list(tensor.shape)}".encode()


def _fingerprint(config: TowerConfig, prints: Mapping[str, bytes]) -> str:
    # By name and not in file order: the same weights in other shards are the same weights.
    by_name = [field for name in sorted(prints) for field in (name, prints[name])]
    return digest_of_fields(repr(config), *by_name)
