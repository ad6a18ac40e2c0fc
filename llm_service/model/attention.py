"""The paged KV cache and attention over it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

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


class KVCache:
    """Keys and values of every layer, [2, blocks, block_size, kv_heads, head_dim] each.

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
        shape = (2, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        devices = (device,) * config.num_layers if isinstance(device, torch.device) else device
        self._data = [torch.empty(shape, dtype=dtype, device=place) for place in devices]
        assert len(self._data) == config.num_layers
        self.num_blocks = num_blocks
        self.block_size = block_size

    @staticmethod
    def block_bytes(config: DecoderConfig, block_size: int, dtype: torch.dtype) -> int:
        """Return the bytes that one block takes over all layers."""
        return config.num_layers * 2 * block_size * config.num_kv_heads * config.head_dim * dtype.itemsize

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values [tokens, kv_heads, head_dim] at their slots."""
        flat = self._data[layer].flatten(1, 2)  # [2, blocks * block_size, kv_heads, head_dim]
        flat[0].index_copy_(0, slots, keys)
        flat[1].index_copy_(0, slots, values)

    def read(self, layer: int, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a sequence's keys and values so far, [length, kv_heads, head_dim] each."""
        keys, values = self._data[layer].index_select(1, span.blocks).flatten(1, 2)
        return keys[: span.length], values[: span.length]

    def copy_block(self, source: int, target: int) -> None:
        """Copy the keys and values of a block, in every layer."""
        for layer in self._data:
            layer[:, target] = layer[:, source]


def paged_attention(
    cache: KVCache,
    layer: int,
    layout: BatchLayout,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """Store the new keys and values, then attend causally within each sequence.

    queries [tokens, heads, head_dim], keys and values [tokens, kv_heads, head_dim]; returns the shape of queries.
    """
    cache.write(layer, layout.slots, keys, values)
    outputs = torch.empty_like(queries)
    for span in layout.spans:
        known_keys, known_values = cache.read(layer, span)
        outputs[span.start : span.end] = _attend(queries[span.start : span.end], known_keys, known_values)
    return outputs


def _attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    count, length = queries.shape[0], keys.shape[0]
    mask = None
    if 1 < count < length:  # a chunk: token i of the chunk sees the length - count tokens before it, and itself
        mask = torch.ones(count, length, dtype=torch.bool, device=queries.device).tril(length - count)
    attended = functional.scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=count == length and count > 1,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
    return attended[0].transpose(0, 1)
