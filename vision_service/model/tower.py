"""The whole vision side of a checkpoint: tiles in, visual tokens out."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from shared.checkpoint import InternVLConfig
from shared.errors import CheckpointError
from vision_service.model.projector import Projector, pixel_shuffle
from vision_service.model.vit import InternVit, VitConfig
from vision_service.preprocess.image import pixel_levels


@dataclass(frozen=True, slots=True)
class TowerConfig:
    """Everything in config.json that decides an embedding's value. Sizes in pixels; `shuffle_factor` merges patches."""

    vit: VitConfig
    image_size: int
    shuffle_factor: int
    shuffle_version: str
    hidden_size: int

    @classmethod
    def of(cls, config: InternVLConfig) -> "TowerConfig":
        """Return the configuration of a checkpoint's vision side, or raise `CheckpointError` naming the setting."""
        if config.ps_version not in ("v1", "v2"):
            raise CheckpointError(f"{config.name}: ps_version {config.ps_version!r} is unknown.")
        factor = round(1 / config.downsample_ratio) if config.downsample_ratio > 0 else 0
        if factor < 1 or 1 / factor != config.downsample_ratio:
            raise CheckpointError(f"{config.name}: downsample_ratio has to be 1 over a whole number.")
        if config.image_size % (config.patch_size * factor):
            raise CheckpointError(f"{config.name}: the image size does not divide into merged patches.")
        return cls(VitConfig.of(config), config.image_size, factor, config.ps_version, config.hidden_size)

    @property
    def tokens_of_vit(self) -> int:
        """Rows per tile inside the vision transformer: its patches and the class token."""
        return (self.image_size // self.vit.patch_size) ** 2 + 1

    @property
    def visual_tokens(self) -> int:
        """Rows per tile that the tower returns."""
        return (self.image_size // self.vit.patch_size // self.shuffle_factor) ** 2


class VisionTower(nn.Module):
    """InternViT, pixel shuffle and projector, under the names of the checkpoints."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = InternVit(config.vit)
        self.mlp1 = Projector(config.vit.hidden_size * config.shuffle_factor**2, config.hidden_size)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return [tiles, tokens per tile, hidden] for tiles uint8 [tiles, size, size, 3]."""
        return self.embed(pixel_values(tiles, self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, where they are not quantized, and of the visual tokens."""
        return self.vision_model.embeddings.class_embedding.dtype

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return [tiles, tokens per tile, hidden] for pixel values [tiles, 3, size, size]."""
        features = self.vision_model(pixels.to(self.dtype))
        patches = features[:, 1:]  # without the class token
        merged = pixel_shuffle(patches, self.config.shuffle_factor, self.config.shuffle_version)
        visual_tokens: torch.Tensor = self.mlp1(merged)
        return visual_tokens


def pixel_values(tiles: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return [n, 3, size, size], normalised and rounded to `dtype`, for tiles uint8 [n, size, size, 3].

    Looked up and not computed, so that every device gives the reference's bits.
    """
    levels = _levels(tiles.device, dtype)
    channels = [levels[channel][tiles[..., channel].int()] for channel in range(3)]
    return torch.stack(channels, dim=1)


@cache
def _levels(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return what every level of every channel becomes, [3, 256]; kept, since recorded graphs cannot copy to a GPU."""
    with torch.inference_mode(False):  # a tensor of inference mode could not be used where there are gradients
        return torch.from_numpy(pixel_levels()).to(device, dtype)
