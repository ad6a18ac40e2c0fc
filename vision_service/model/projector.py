"""From the vision transformer's patches to visual tokens: pixel shuffle, then the MLP into the LLM's width."""

import torch
from torch import nn

_LAYER_NORM_EPS = 1e-5  # not a setting of the checkpoints


def pixel_shuffle(patches: torch.Tensor, factor: int, version: str) -> torch.Tensor:
    """Merge every `factor` x `factor` patches into one token: [tiles, side * side, C] to [tiles, tokens, C * factor²].

    Tokens of version "v2" come row by row, those of "v1" column by column; their content is the same.
    """
    tiles, count, _ = patches.shape
    side = round(count**0.5)
    merged = side // factor
    cells = patches.reshape(tiles, merged, factor, merged, factor, -1)  # [tiles, row, cell row, column, cell column, C]
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    return cells.permute(order).reshape(tiles, merged * merged, -1)


class Projector(nn.Sequential):
    """The MLP from merged patches to the language model's width; numbered as `mlp1` in checkpoints."""

    def __init__(self, in_features: int, hidden_size: int) -> None:
        super().__init__(
            nn.LayerNorm(in_features, _LAYER_NORM_EPS),
            nn.Linear(in_features, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size),
        )
