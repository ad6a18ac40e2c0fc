"""The model in training form: the services' own modules, run over whole rows with gradients.

The parameters are those of `VisionTower` and `Decoder`; only attention is written again. What the services compute with
a paged cache is computed here over [rows, tokens] with a mask, which tests hold against the services.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from examples.nano.batches import PADDING, TRUNK
from llm_service.model.config import DecoderConfig, decoder_config
from llm_service.model.decoder import Decoder, DecoderLayer
from llm_service.model.loader import tensor_targets
from llm_service.model.rope import Rope
from shared.checkpoint import Checkpoint, InternVLConfig, read_config
from vision_service.model.projector import pixel_shuffle
from vision_service.model.tower import TowerConfig, VisionTower, pixel_values
from vision_service.model.vit import Block, Embeddings

_MASKED = -1e4


class Nano(nn.Module):
    """Tower and decoder with gradients. The weights are drawn from `seed`."""

    def __init__(self, tower: TowerConfig, decoder: DecoderConfig, seed: int = 0) -> None:
        super().__init__()
        self.tower = VisionTower(tower)
        self.decoder = Decoder(decoder)
        self._rope = Rope(self.decoder.config.rope, self.decoder.config.head_dim, torch.device("cpu"))
        self._block: Callable[..., torch.Tensor] = _vision_block
        self._layer: Callable[..., torch.Tensor] = _decoder_layer
        self.requires_grad_(True)
        _initialise(self, torch.Generator().manual_seed(seed))

    @classmethod
    def of(cls, config: InternVLConfig, seed: int = 0) -> "Nano":
        """Return a new model of a checkpoint's shape."""
        return cls(TowerConfig.of(config), decoder_config(config.llm), seed)

    def compile_layers(self) -> None:
        """Have torch compile what every layer computes; the first steps then take half a minute longer."""
        self._block = torch.compile(_vision_block, dynamic=True)
        self._layer = torch.compile(_decoder_layer, dynamic=False)

    def visual_tokens(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return [visual tokens, hidden] for tiles uint8 [tiles, size, size, 3]."""
        return self.projected(self.merged_patches(tiles))

    def merged_patches(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return what the vision transformer sees in tiles uint8 [tiles, size, size, 3], [visual tokens, merged]."""
        config = self.tower.config
        if not len(tiles):
            width = config.vit.hidden_size * config.shuffle_factor**2
            return torch.zeros((0, width), device=tiles.device)
        features = _embedded_patches(self.tower.vision_model.embeddings, tiles)
        for block in self.tower.vision_model.encoder.layers:
            assert isinstance(block, Block)
            features = self._block(block, features)
        merged = pixel_shuffle(features[:, 1:], config.shuffle_factor, config.shuffle_version)
        return torch.flatten(merged, 0, 1)

    def projected(self, merged: torch.Tensor) -> torch.Tensor:
        """Return [visual tokens, hidden] for what `merged_patches` returns."""
        projected: torch.Tensor = self.tower.mlp1(merged)
        return projected

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        branches: torch.Tensor,
        visual_tokens: torch.Tensor,
        places: torch.Tensor,
    ) -> torch.Tensor:
        """Return final hidden states [rows, tokens, hidden]; `visual_tokens` [n, hidden] go to flat `places` [n]."""
        hidden = self.decoder.embed(ids)
        spliced = hidden.flatten(0, 1).index_copy(0, places, visual_tokens.to(hidden.dtype))
        hidden = spliced.view_as(hidden)
        rotation = self._rotation(positions)
        mask = attention_mask(branches)
        for layer in self.decoder.layers:
            assert isinstance(layer, DecoderLayer)
            hidden = self._layer(layer, self.decoder.config, hidden, rotation, mask)
        return rms_norm(hidden, self.decoder.norm)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return float32 logits of final hidden states."""
        return self.decoder.logits(hidden)

    def _rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin [rows, tokens, 1, head_dim]."""
        flat = positions.flatten().cpu()
        cos, sin = self._rope.rotation(flat, flat + 1)
        shape = (*positions.shape, 1, cos.shape[-1])
        return cos.view(shape).to(positions.device), sin.view(shape).to(positions.device)


def load_nano(directory: Path) -> Nano:
    """Return the model of a checkpoint directory."""
    model = Nano.of(read_config(directory))
    targets = {
        **{name: tensor.data for name, tensor in model.tower.state_dict().items()},
        **tensor_targets(model.decoder),
    }
    for name, tensor in Checkpoint(directory).load(targets):
        targets[name].copy_(tensor)
    return model


def attention_mask(branches: torch.Tensor) -> torch.Tensor:
    """Return what is added to scores, [rows, 1, tokens, tokens]: zero where a token may look, else very negative.

    A token sees the trunk and its own branch, up to itself. Padding sees itself, so that no row is empty.
    """
    own, other = branches[:, :, None], branches[:, None, :]
    earlier = torch.ones(branches.shape[1:] * 2, dtype=torch.bool, device=branches.device).tril()
    allowed = ((other == TRUNK) | (other == own)) & (own != PADDING) & earlier
    allowed |= torch.eye(branches.shape[1], dtype=torch.bool, device=branches.device)
    return torch.zeros(allowed.shape, device=branches.device).masked_fill_(~allowed, _MASKED)[:, None]


def rms_norm(hidden: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """Apply one of the decoder's norms."""
    weight: torch.Tensor = norm.weight  # type: ignore[assignment]
    return functional.rms_norm(hidden, (hidden.shape[-1],), weight, norm._eps)  # type: ignore[arg-type]


def _embedded_patches(embeddings: Embeddings, tiles: torch.Tensor) -> torch.Tensor:
    """Return what the tower's embeddings return; as a product of matrices, which is faster backwards."""
    kernel = embeddings.patch_embedding
    side = embeddings.trained_side
    pixels = pixel_values(tiles)  # [tiles, 3, size, size]
    size = pixels.shape[-1] // side
    cells = pixels.reshape(len(tiles), 3, side, size, side, size)  # [tiles, 3, row, y, column, x]
    rows = cells.permute(0, 2, 4, 1, 3, 5).reshape(len(tiles), side * side, -1)
    patches = functional.linear(rows, kernel.weight.flatten(1), kernel.bias)
    class_tokens = embeddings.class_embedding.expand(len(tiles), -1, -1)
    return torch.cat((class_tokens, patches.to(class_tokens.dtype)), dim=1) + embeddings.position_embedding


def _vision_block(block: Block, x: torch.Tensor) -> torch.Tensor:
    attention = block.attn
    tiles, tokens, width = x.shape
    qkv = attention.qkv(block.norm1(x)).view(tiles, tokens, 3, attention.num_heads, -1)
    queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # [tiles, heads, tokens, head size]
    mixed = _attend(queries, keys, values, None).transpose(1, 2).reshape(tiles, tokens, width)
    x = x + attention.proj(mixed) * block.ls1
    out: torch.Tensor = x + block.mlp(block.norm2(x)) * block.ls2
    return out


def _decoder_layer(
    layer: DecoderLayer,
    config: DecoderConfig,
    hidden: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
) -> torch.Tensor:
    rows, tokens, _ = hidden.shape
    fused = layer.attention.qkv(rms_norm(hidden, layer.attention_norm))
    queries, keys, values = (
        part.view(rows, tokens, -1, config.head_dim) for part in fused.split(config.qkv_rows, dim=-1)
    )
    queries, keys = _rotated(queries, *rotation), _rotated(keys, *rotation)
    groups = config.num_heads // config.num_kv_heads
    keys, values = (part.repeat_interleave(groups, 2) if groups > 1 else part for part in (keys, values))
    mixed = _attend(queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), mask)
    hidden = hidden + layer.attention.out(mixed.transpose(1, 2).reshape(rows, tokens, -1))
    gate, up = layer.mlp.gate_up(rms_norm(hidden, layer.mlp_norm)).chunk(2, dim=-1)
    out: torch.Tensor = hidden + layer.mlp.down(functional.silu(gate) * up)
    return out


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cos.to(states.dtype) + torch.cat((-second, first), dim=-1) * sin.to(states.dtype)


def _attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Attend in plain steps: on a CPU the library's fused attention is several times slower backwards."""
    if queries.is_cuda:
        bias = None if mask is None else mask.to(queries.dtype)
        return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    mixed: torch.Tensor = scores.softmax(dim=-1).to(values.dtype) @ values
    return mixed


def _initialise(model: Nano, generator: torch.Generator) -> None:
    """Draw all weights; what ends in the residual stream is drawn smaller in deep models."""
    for name, parameter in model.named_parameters():
        drawn = _initial(name, parameter, _depth(model, name), generator)
        parameter.data.copy_(drawn)
    table = model.tower.vision_model.embeddings.position_embedding
    table.data[:, 1:] += 0.5 * _grid_waves(model.tower.config.vit.trained_side, table.shape[-1])


def _initial(name: str, parameter: torch.Tensor, depth: int, generator: torch.Generator) -> torch.Tensor:
    if name.endswith((".ls1", ".ls2")) or ("norm" in name.rsplit(".", 2)[-2] and name.endswith("weight")):
        return torch.ones_like(parameter)
    if name.endswith("mlp1.0.weight"):
        return torch.ones_like(parameter)
    if name.endswith("bias"):
        return torch.zeros_like(parameter)
    noise = torch.randn(parameter.shape, generator=generator)
    if name.endswith(("embedding", "embed.weight", "head.weight")):
        return noise * (0.5 if name.endswith("embed.weight") else 0.02)
    scale = 1 / math.sqrt(parameter[0].numel())
    into_residual = name.endswith(("attn.proj.weight", "fc2.weight", "attention.out.weight", "down.weight"))
    return noise * scale / (math.sqrt(2 * depth) if into_residual else 1)


def _depth(model: Nano, name: str) -> int:
    return len(model.tower.vision_model.encoder.layers if name.startswith("tower") else model.decoder.layers)


def _grid_waves(side: int, width: int) -> torch.Tensor:
    """Return sines and cosines of rows and columns, [side * side, width]: neighbours are alike from the start."""
    quarter = width // 4
    frequencies = torch.exp(torch.arange(quarter) * (-math.log(100.0) / quarter))
    steps = torch.arange(side)[:, None] * frequencies
    waves = torch.cat((steps.sin(), steps.cos()), dim=-1)  # [side, width / 2]
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    grid = torch.cat((rows, columns), dim=-1).reshape(side * side, -1)
    return functional.pad(grid, (0, width - grid.shape[-1]))


def tensors_of(batch: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """Return a batch's arrays on a device, by name."""
    names = (
        "tiles",
        "seen",
        "boxes",
        "ids",
        "positions",
        "branches",
        "targets",
        "weights",
        "answers",
        "places",
        "sources",
        "kinds",
    )
    return {name: torch.from_numpy(getattr(batch, name)).to(device, non_blocking=True) for name in names}
