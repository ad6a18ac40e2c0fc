"""The whole vision side of a checkpoint: tiles in, visual tokens out."""

from dataclasses import dataclass

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


class VisionTower(nn.Module):
    """InternViT, pixel shuffle and projector, under the names of the checkpoints."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = InternVit(config.vit)
        self.mlp1 = Projector(config.vit.hidden_size * config.shuffle_factor**2, config.hidden_size)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return [tiles, tokens per tile, hidden] for tiles uint8 [tiles, size, size, 3]."""
        return self.embed(pixel_values(tiles))

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return [tiles, tokens per tile, hidden] for pixel values [tiles, 3, size, size]."""
        features = self.vision_model(pixels.to(next(self.parameters()).dtype))
        patches = features[:, 1:]  # without the class token
        merged = pixel_shuffle(patches, self.config.shuffle_factor, self.config.shuffle_version)
        visual_tokens: torch.Tensor = self.mlp1(merged)
        return visual_tokens


def pixel_values(tiles: torch.Tensor) -> torch.Tensor:
    """Return float32 [n, 3, size, size], normalised, for tiles uint8 [n, size, size, 3].

    Looked up and not computed, so that every device gives the reference's bits.
    """
    levels = torch.from_numpy(pixel_levels()).to(tiles.device)
    channels = [levels[channel][tiles[..., channel].int()] for channel in range(3)]
    return torch.stack(channels, dim=1)
