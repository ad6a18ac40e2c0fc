"""The paged KV cache, and what attention over it promises, whatever computes it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from llm_service.model.config import DecoderConfig


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's tokens in a batch: rows `start` to `end`, of a sequence then `length` tokens long.

    `blocks` is the sequence's block table, int64 [ceil(length / block_size)].
    """

    start: int
    end: int
    length: int
    blocks: torch.Tensor

    @property
    def count(self) -> int:
        """How many of the batch's rows are the sequence's."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class KnownTokens:
    """What sequences know, as the native kernels read it; int64 all three.

    `lengths` [sequences] count tokens; the blocks of sequence i are `tables` [blocks] from `starts[i]` on.
    """

    lengths: np.ndarray
    starts: np.ndarray
    tables: torch.Tensor

    @classmethod
    def of(cls, spans: Sequence[Span]) -> "KnownTokens":
        """Return what the sequences of these spans know."""
        counts = np.array([len(span.blocks) for span in spans], np.int64)
        lengths = np.array([span.length for span in spans], np.int64)
        return cls(lengths, counts.cumsum() - counts, torch.cat([span.blocks for span in spans]))

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Where the three lie, in this order."""
        return self.lengths.ctypes.data, self.starts.ctypes.data, self.tables.data_ptr()


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """Where a batch's tokens belong: `slots` int64 [tokens] are their places in the cache."""

    spans: tuple[Span, ...]
    slots: torch.Tensor

    def to(self, device: torch.device) -> "BatchLayout":
        """Return the layout on a device: itself, where it is there."""
        if self.slots.device == device:
            return self
        # All block tables in one copy.
        tables = torch.cat([span.blocks for span in self.spans]).to(device)
        parts = torch.split(tables, [len(span.blocks) for span in self.spans])
        spans = tuple(replace(span, blocks=blocks) for span, blocks in zip(self.spans, parts, strict=True))
        return BatchLayout(spans, self.slots.to(device))


@dataclass(frozen=True, slots=True)
class CachedLayer:
    """A layer's keys and values by slot, twice the same memory.

    `rows` are [slots, 2 * kv_heads * head_dim], all keys before all values; `keys` and `values` are
    [1, kv_heads, slots, head_dim] each.
    """

    rows: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(cls, slots: torch.Tensor) -> "CachedLayer":
        """Return the views of [slots, 2, kv_heads, head_dim]."""
        keys, values = slots.permute(1, 2, 0, 3)[:, None].unbind()
        return cls(slots.flatten(1), keys, values)

    def run(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of a run of slots, in place."""
        return self.keys[:, :, start:end], self.values[:, :, start:end]

    def copies(self, slots: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of keys and values of slots [count * length], [count, kv_heads, length, head_dim] each."""
        _, kv_heads, _, head_dim = self.keys.shape
        both = self.rows.index_select(0, slots).view(count, -1, 2, kv_heads, head_dim)
        keys, values = both.permute(2, 0, 3, 1, 4).unbind()
        return keys, values


class KVCache:
    """Keys and values of every layer, [blocks, block_size, 2, kv_heads, head_dim] each: a token's lie side by side.

    They are on one device, or on that of each layer.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | Sequence[torch.device],
    ) -> None:
        shape = (num_blocks, block_size, 2, config.num_kv_heads, config.head_dim)
        devices = (device,) * config.num_layers if isinstance(device, torch.device) else device
        self._blocks = [torch.empty(shape, dtype=dtype, device=place) for place in devices]
        assert len(self._blocks) == config.num_layers
        self._layers = [CachedLayer.of(blocks.flatten(0, 1)) for blocks in self._blocks]
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype

    @staticmethod
    def block_bytes(config: DecoderConfig, block_size: int, dtype: torch.dtype) -> int:
        """Return the bytes that one block takes over all layers."""
        return config.num_layers * 2 * block_size * config.num_kv_heads * config.head_dim * dtype.itemsize

    def layer(self, layer: int) -> "CachedLayer":
        """Return a layer's memory by slot; slot = block * block_size + place in the block."""
        return self._layers[layer]

    def pages(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values by block, [blocks, block_size, kv_heads, head_dim] each."""
        keys, values = self._blocks[layer].unbind(2)
        return keys, values

    def write(self, layer: int, slots: torch.Tensor, keys_and_values: torch.Tensor) -> None:
        """Store [tokens, 2 * kv_heads * head_dim], all keys before all values, at their slots."""
        self._layers[layer].rows.index_copy_(0, slots, keys_and_values)

    def read(self, layer: int, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a sequence's keys and values so far, [length, kv_heads, head_dim] each."""
        known = self._blocks[layer].index_select(0, span.blocks).flatten(0, 1)[: span.length]
        return known[:, 0], known[:, 1]

    def copy_block(self, source: int, target: int) -> None:
        """Copy the keys and values of a block, in every layer."""
        for blocks in self._blocks:
            blocks[target] = blocks[source]


class StepAttention(Protocol):
    """Attention of one step's batch, in the layers of one device. What is the same in all layers is worked out once."""

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """Store the new keys and values, then attend causally within each sequence.

        `qkv` holds a row [queries, keys, values] per token, queries and keys rotated. Returns the attended values of
        all heads, [tokens, heads * head_dim], which no later step writes to.
        """


class AttentionBackend(Protocol):
    """A way to compute attention on a kind of device."""

    def __call__(self, config: DecoderConfig, cache: KVCache, layout: BatchLayout) -> StepAttention:
        """Begin a step. The layout is on the device of the layers that will attend."""
