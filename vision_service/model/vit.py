"""InternViT, the vision transformer: pixels of tiles to one row of features per patch.

Module names are those of the checkpoints, so that a state dict needs no renaming.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from shared.checkpoint import InternVLConfig
from shared.errors import CheckpointError
from shared.tile_attention import Heads, attend, can_attend


@dataclass(frozen=True, slots=True)
class VitConfig:
    """Shape of an InternViT. `num_layers` counts the blocks that run: those after `select_layer` are left out."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    patch_size: int
    trained_image_size: int
    norm_type: str
    norm_eps: float
    qkv_bias: bool
    qk_normalization: bool

    @classmethod
    def of(cls, config: InternVLConfig) -> "VitConfig":
        """Return the configuration of a checkpoint's vision tower, or raise `CheckpointError` naming the setting."""
        raw = config.vision
        try:
            vit = cls(
                hidden_size=int(raw["hidden_size"]),
                num_layers=_depth(int(raw["num_hidden_layers"]), config.select_layer),
                num_heads=int(raw["num_attention_heads"]),
                intermediate_size=int(raw["intermediate_size"]),
                patch_size=config.patch_size,
                trained_image_size=int(raw["image_size"]),
                norm_type=str(raw["norm_type"]),
                norm_eps=float(raw["layer_norm_eps"]),
                qkv_bias=bool(raw["qkv_bias"]),
                qk_normalization=bool(raw["qk_normalization"]),
            )
        except KeyError as error:
            raise CheckpointError(f"{config.name}: vision_config has no {error.args[0]!r}.") from None
        except (TypeError, ValueError):
            raise CheckpointError(f"{config.name}: vision_config has a value of the wrong type.") from None
        if vit.norm_type not in _NORMS or raw.get("hidden_act", "gelu") != "gelu":
            raise CheckpointError(f"{config.name}: vision_config has an unknown norm_type or hidden_act.")
        if vit.num_heads < 1 or vit.hidden_size % vit.num_heads:
            raise CheckpointError(f"{config.name}: hidden_size is not a multiple of num_attention_heads.")
        return vit

    @property
    def trained_side(self) -> int:
        """Patches along one side of the tiles that the position table was trained for."""
        return self.trained_image_size // self.patch_size


class RmsNorm(nn.Module):
    """Scales rows to unit root mean square; computed in float32, weighted in the input's type."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


_NORMS: dict[str, Callable[[int, float], nn.Module]] = {"layer_norm": nn.LayerNorm, "rms_norm": RmsNorm}


class PatchEmbedding(nn.Module):
    """Each patch's pixels to a row: the convolution of the checkpoints, as the matrix product that it is."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size, 3, config.patch_size, config.patch_size))
        self.bias = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return [tiles, rows, columns, hidden] for pixels [tiles, 3, height, width]."""
        tiles, channels, height, width = pixels.shape
        side = self.weight.shape[-1]
        cells = pixels.reshape(tiles, channels, height // side, side, width // side, side)
        patches = cells.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [tiles, rows, columns, 3 * side * side]
        return functional.linear(patches, self.weight.flatten(1), self.bias)


class Embeddings(nn.Module):
    """Patches to rows, a class token before them, positions added."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.trained_side = config.trained_side
        self.class_embedding = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = nn.Parameter(torch.empty(1, config.trained_side**2 + 1, config.hidden_size))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return [tiles, 1 + patches, hidden] for pixels [tiles, 3, height, width]."""
        patches = self.patch_embedding(pixels)
        positions = self._positions(patches.shape[1], patches.shape[2])
        class_tokens = self.class_embedding.expand(len(pixels), -1, -1)
        return torch.cat((class_tokens, patches.flatten(1, 2)), dim=1) + positions

    def _positions(self, rows: int, columns: int) -> torch.Tensor:
        side, table = self.trained_side, self.position_embedding
        if (rows, columns) == (side, side):
            return table
        grid = table[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = functional.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat((table[:, :1], grid.flatten(2).transpose(1, 2).to(table.dtype)), dim=1)


class Attention(nn.Module):
    """Full self-attention over one tile's tokens."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        # Over the full width, before the heads are split.
        self.q_norm = RmsNorm(width, config.norm_eps) if config.qk_normalization else nn.Identity()
        self.k_norm = RmsNorm(width, config.norm_eps) if config.qk_normalization else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix the tokens of [tiles, tokens, hidden]."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        projected: torch.Tensor = self.proj(self._mixed(self.q_norm(q), self.k_norm(k), v))
        return projected

    def _mixed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return what the heads see, all [tiles, tokens, hidden]."""
        heads = Heads(self.num_heads, self.num_heads, q.shape[-1] // self.num_heads)
        if can_attend(q, heads):
            return torch.stack([attend(*one, heads) for one in zip(q, k, v, strict=True)])
        mixed = functional.scaled_dot_product_attention(self._heads(q), self._heads(k), self._heads(v))
        return mixed.transpose(1, 2).flatten(2)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)


class Mlp(nn.Module):
    """Two layers with the exact (erf) GELU between."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform each token of [tiles, tokens, hidden]."""
        out: torch.Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Block(nn.Module):
    """Attention and MLP, each normalised before and scaled per channel after."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        norm = _NORMS[config.norm_type]
        self.attn = Attention(config)
        self.mlp = Mlp(config)
        self.norm1 = norm(config.hidden_size, config.norm_eps)
        self.norm2 = norm(config.hidden_size, config.norm_eps)
        self.ls1 = nn.Parameter(torch.empty(config.hidden_size))
        self.ls2 = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform [tiles, tokens, hidden] in place: one rounding and no new memory per sum. Not for gradients."""
        x.addcmul_(self.attn(self.norm1(x)), self.ls1)
        return x.addcmul_(self.mlp(self.norm2(x)), self.ls2)


class Blocks(nn.Module):
    """The blocks, one after the other."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform [tiles, tokens, hidden] in place."""
        for layer in self.layers:
            x = layer(x)
        return x


class InternVit(nn.Module):
    """The vision transformer. It has no norm after the last block and no pooling."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Blocks(config)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return [tiles, 1 + patches, hidden] for pixels [tiles, 3, height, width]; row 0 is the class token."""
        features: torch.Tensor = self.encoder(self.embeddings(pixels))
        return features


def _depth(num_layers: int, select_layer: int) -> int:
    # `select_layer` indexes the list of hidden states: the embeddings' output, then every block's.
    depth = select_layer if select_layer >= 0 else num_layers + 1 + select_layer
    if not 0 <= depth <= num_layers:
        raise CheckpointError(f"select_layer {select_layer} is outside the {num_layers} layers of the vision tower.")
    return depth
