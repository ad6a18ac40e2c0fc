"""Attention by torch's own choice of kernel, one sequence after another: right on every device."""

import torch
from torch.nn import functional

from llm_service.model.attention import BatchLayout, KVCache
from llm_service.model.config import DecoderConfig


class PlainAttention:
    """A `StepAttention` that copies each sequence's keys and values out of the cache."""

    def __init__(self, config: DecoderConfig, cache: KVCache, layout: BatchLayout) -> None:
        self._config = config
        self._cache = cache
        self._layout = layout

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """Store and attend; see `StepAttention`."""
        query_rows = self._config.qkv_rows[0]
        self._cache.write(layer, self._layout.slots, qkv[:, query_rows:])
        queries = qkv[:, :query_rows].view(len(qkv), self._config.num_heads, self._config.head_dim)
        outputs = torch.empty((len(qkv), query_rows), dtype=qkv.dtype, device=qkv.device)
        for span in self._layout.spans:
            keys, values = self._cache.read(layer, span)
            attended = _attend(queries[span.start : span.end], keys, values)
            outputs[span.start : span.end] = attended.flatten(1)
        return outputs


def _attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return [count, heads, head_dim] for the last `count` tokens of a sequence."""
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
