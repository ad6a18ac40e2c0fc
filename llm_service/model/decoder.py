"""The language model: one decoder for every family whose shape `DecoderConfig` describes.

It works on flat batches, [tokens, hidden], of any mix of prompts and single tokens; `BatchLayout` says what belongs
together. Projections that read the same input are fused. A linear layer may be any module that does what `nn.Linear`
does: packed, or of fewer bits.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import chain, groupby

import torch
from torch import nn

from llm_service.model.attention import BatchLayout, KVCache, StepAttention
from llm_service.model.backends import attention_for
from llm_service.model.config import DecoderConfig
from llm_service.model.native_layers import NativeLayers
from llm_service.model.rope import Rope, Rotation
from llm_service.model.row_ops import rms_norm, rotate_, silu_and_multiply
from shared.packed_linear import PackedLinear, added


class RMSNorm(nn.Module):
    """Root mean square norm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self._eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return [tokens, size] for [tokens, size]."""
        return rms_norm(hidden, self.weight, self._eps)


class Attention(nn.Module):
    """Grouped-query attention over the paged cache."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self._rotated = sum(config.qkv_rows[:2])
        self._layer = layer
        self.qkv = _linear(config.hidden_size, sum(config.qkv_rows), bias=config.qkv_bias)
        self.out = _linear(config.num_heads * config.head_dim, config.hidden_size, bias=config.out_bias)

    def forward(
        self, normed: torch.Tensor, hidden: torch.Tensor, rotation: Rotation, step: StepAttention
    ) -> torch.Tensor:
        """Return `hidden` plus what attention makes of `normed`, [tokens, hidden] all three."""
        qkv = self.qkv(normed)
        rotate_(qkv[:, : self._rotated], rotation.cos, rotation.sin)
        return added(self.out, step.attend(self._layer, qkv), hidden)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up = _linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down = _linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, normed: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return `hidden` plus what the MLP makes of `normed`, [tokens, hidden] all three."""
        return added(self.down, silu_and_multiply(self.gate_up(normed)), hidden)


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to its input."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, hidden: torch.Tensor, rotation: Rotation, step: StepAttention) -> torch.Tensor:
        """Apply to [tokens, hidden], on the layer's device."""
        hidden = self.attention(self.attention_norm(hidden), hidden, rotation, step)
        out: torch.Tensor = self.mlp(self.mlp_norm(hidden), hidden)
        return out

    @property
    def device(self) -> torch.device:
        """Where the layer's weights are."""
        return self.attention_norm.weight.device


class Decoder(nn.Module):
    """The whole language model. Not thread-safe: it belongs to the model thread."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        # Made from an empty table: the constructor's own draws random rows, and on the meta device that imports seconds
        # of modules.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed = nn.Embedding.from_pretrained(table)  # type: ignore[no-untyped-call]
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head: nn.Module = _linear(config.hidden_size, config.vocab_size)
        self._native: tuple[KVCache, NativeLayers | None] | None = None
        self.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """The element type of weights and activations."""
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where steps begin and end: the device of embeddings, norm and head."""
        return self.norm.weight.device

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights."""
        packed = (module.matrix_bytes for module in self.modules() if isinstance(module, PackedLinear))
        return sum(weight.nbytes for weight in chain(self.parameters(), self.buffers())) + sum(packed)

    @property
    def uses_native_kernels(self) -> bool:
        """Whether matrices are multiplied by the kernels that are compiled at installation."""
        return any(isinstance(module, PackedLinear) and module.has_kernel for module in self.modules())

    @property
    def layer_devices(self) -> tuple[torch.device, ...]:
        """Where each layer's weights are."""
        return tuple(layer.device for layer in self._layers)

    @property
    def _layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    @cached_property
    def _runs(self) -> Sequence[tuple[torch.device, Sequence[DecoderLayer]]]:
        """The layers in order, in runs that are on one device."""
        return [(device, list(layers)) for device, layers in groupby(self._layers, lambda layer: layer.device)]

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        lengths: torch.Tensor,
        layout: BatchLayout,
        cache: KVCache,
        rope: Rope,
    ) -> torch.Tensor:
        """Return the final hidden states [tokens, hidden] of input embeddings [tokens, hidden].

        `positions` and `lengths` are int64 [tokens]: each token's position, and its sequence's length after this batch.
        """
        rotation = rope.rotation_in(hidden.dtype, positions, lengths)
        native = self._native_over(cache)
        if native is not None and native.take(layout):
            return native.forward(hidden, rotation, layout)
        for device, layers in self._runs:
            hidden, placed = hidden.to(device), rotation.to(device)
            step = attention_for(device, hidden.dtype, cache.block_size)(self.config, cache, layout.to(device))
            for layer in layers:
                hidden = layer(hidden, placed, step)
        normed: torch.Tensor = self.norm(hidden)
        return normed

    def _native_over(self, cache: KVCache) -> NativeLayers | None:
        """Return what computes all layers at once; the layers do not change once a step has been computed."""
        if self._native is None or self._native[0] is not cache:
            self._native = cache, NativeLayers.of(self.config, cache, self._layers, self.norm.weight)
        return self._native[1]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [rows, vocab] of final hidden states [rows, hidden], of their type."""
        logits: torch.Tensor = self.head(hidden)
        return logits


def _linear(inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias)
