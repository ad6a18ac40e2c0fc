"""Attention on a GPU, by flash-attn, which reads the paged cache through block tables and neither pads nor masks."""

from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, Protocol

import torch
from torch.nn.utils.rnn import pad_sequence

from llm_service.model.attention import AttentionBackend, BatchLayout, KVCache
from llm_service.model.config import DecoderConfig

BLOCK_SIZE: Final = 256  # flash-attn 2 reads pages of a multiple of this
_DTYPES: Final = (torch.bfloat16, torch.float16)


class _Kernel(Protocol):
    def __call__(self, *states: torch.Tensor, **options: Any) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Kernels:
    """flash-attn's two entry points: one token for each of several sequences, and any mix of tokens."""

    decode: _Kernel
    varlen: _Kernel


class FlashAttention:
    """A `StepAttention` for layers on a GPU."""

    def __init__(self, kernels: Kernels, config: DecoderConfig, cache: KVCache, layout: BatchLayout) -> None:
        self._kernels = kernels
        self._config = config
        self._cache = cache
        self._slots = layout.slots
        spans, device = layout.spans, layout.slots.device
        lengths = [span.length for span in spans]
        self._tables = pad_sequence([span.blocks for span in spans], batch_first=True).int()  # [sequences, blocks]
        self._is_decoding = all(span.count == 1 for span in spans)
        self._lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        if not self._is_decoding:
            self._query_ends = _ends([span.count for span in spans], device)
            self._key_ends = _ends(lengths, device)
            self._most_queries, self._most_keys = max(span.count for span in spans), max(lengths)

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """Store and attend; see `StepAttention`."""
        query_rows = self._config.qkv_rows[0]
        self._cache.write(layer, self._slots, qkv[:, query_rows:])
        keys, values = self._cache.pages(layer)
        queries = qkv[:, :query_rows].view(len(qkv), self._config.num_heads, self._config.head_dim)
        if self._is_decoding:
            options = {"cache_seqlens": self._lengths, "block_table": self._tables, "causal": True}
            return self._kernels.decode(queries[:, None], keys, values, **options).reshape(len(qkv), -1)
        attended = self._kernels.varlen(
            queries,
            keys,
            values,
            cu_seqlens_q=self._query_ends,
            cu_seqlens_k=self._key_ends,
            max_seqlen_q=self._most_queries,
            max_seqlen_k=self._most_keys,
            block_table=self._tables,
            causal=True,
        )
        return attended.reshape(len(qkv), -1)


def flash_attention_for(device: torch.device, dtype: torch.dtype, block_size: int) -> AttentionBackend | None:
    """Return attention by flash-attn; None where it is not installed or cannot read such a cache."""
    if device.type != "cuda" or dtype not in _DTYPES or block_size % BLOCK_SIZE or not is_installed():
        return None
    return partial(FlashAttention, _kernels())


def is_installed() -> bool:
    """Return whether flash-attn is there, without importing it."""
    return find_spec("flash_attn") is not None


@cache
def _kernels() -> Kernels:
    module = import_module("flash_attn")
    return Kernels(module.flash_attn_with_kvcache, module.flash_attn_varlen_func)


def _ends(counts: list[int], device: torch.device) -> torch.Tensor:
    """Return where each sequence begins and the last ends, int32 [sequences + 1]."""
    return torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32)
