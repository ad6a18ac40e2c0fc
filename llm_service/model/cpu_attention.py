"""Attention on a CPU, by torch's fused kernel called directly: no copies and no masks where none are needed.

The operator is private to torch, and used nowhere else. `can_attend` says whether it is there and does what it should.
Where there are native kernels, they do it: for single tokens one that reads the paged cache in place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch.nn import functional

from llm_service.model.attention import BatchLayout, CachedLayer, KnownTokens, KVCache, Span
from llm_service.model.config import DecoderConfig
from shared import tile_attention
from shared.native.library import Function, kernels
from shared.tile_attention import Heads

# Single tokens of sequences up to so long are attended to together, over a copy of what they know: a call of the kernel
# costs as much as some hundred known tokens. Longer ones read the cache in place.
_TOGETHER_UP_TO: Final = 768
_PADDING: Final = 1.5  # how many times as long as its shortest sequence a group is padded to at most
# Where a sequence's tokens are: start and end of a run of slots, or int64 [length].
_Slots = tuple[int, int] | torch.Tensor


class CpuAttention:
    """A `StepAttention` for layers on a CPU."""

    def __init__(self, config: DecoderConfig, cache: KVCache, layout: BatchLayout) -> None:
        self._cache = cache
        self._slots = layout.slots
        self._query_rows = config.qkv_rows[0]
        singles = [span for span in layout.spans if span.count == 1]
        chunks = [span for span in layout.spans if span.count > 1]
        self._parts: list[_Part] = [
            *_parts_of(singles, config, cache),
            *(_chunk_of(span, config, cache) for span in chunks),
        ]

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """Store and attend; see `StepAttention`."""
        self._cache.write(layer, self._slots, qkv[:, self._query_rows :])
        known, queries = self._cache.layer(layer), qkv[:, : self._query_rows]
        if len(self._parts) == 1:  # its rows are all rows, in order
            return self._parts[0].attend(queries, known)
        outputs = torch.empty(queries.shape, dtype=queries.dtype)
        for part in self._parts:
            outputs[part.rows] = part.attend(queries[part.rows], known)
        return outputs


class _Part(Protocol):
    """Rows of a batch that are attended to in one call."""

    @property
    def rows(self) -> slice | torch.Tensor:
        """Which rows: a run of them, or int64 [rows]."""

    def attend(self, queries: torch.Tensor, known: CachedLayer) -> torch.Tensor:
        """Return [rows, heads * head_dim] for as many rows of queries."""


class _Native:
    """Single tokens of any number of sequences, by the native kernel: what they know is read where it lies."""

    def __init__(self, attend: Function, config: DecoderConfig, block_size: int, spans: Sequence[Span]) -> None:
        self.rows = _rows_of(spans)
        self._attend = attend
        self._known_tokens = KnownTokens.of(spans)
        self._sizes = (len(spans), block_size, config.num_heads, config.num_kv_heads, config.head_dim)
        self._scale = config.head_dim**-0.5

    def attend(self, queries: torch.Tensor, known: CachedLayer) -> torch.Tensor:
        outputs = torch.empty(queries.shape, dtype=queries.dtype)
        self._attend(
            queries.data_ptr(),
            queries.stride(0),
            known.rows.data_ptr(),
            *self._known_tokens.addresses,
            *self._sizes,
            self._scale,
            outputs.data_ptr(),
        )
        return outputs


@dataclass(frozen=True, slots=True)
class _Single:
    """The one token of a sequence. The heads that share a key take the place of tokens: each of them sees all keys."""

    rows: slice
    slots: _Slots

    def attend(self, queries: torch.Tensor, known: CachedLayer) -> torch.Tensor:
        keys, values = _known(known, self.slots)
        _, kv_heads, _, head_dim = keys.shape
        attended, _ = _flash(queries.view(1, kv_heads, -1, head_dim), keys, values)
        return attended.reshape(1, -1)


@dataclass(frozen=True, slots=True)
class _Together:
    """Single tokens of several sequences, over copies of what they know, padded with tokens of their own and masked.

    Never with what happens to be in the cache: numbers of another sequence that are none would pass any mask. `slots`
    is int64 [sequences * longest], `mask` [sequences, 1, 1, longest].
    """

    rows: slice | torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor | None

    def attend(self, queries: torch.Tensor, known: CachedLayer) -> torch.Tensor:
        count = len(queries)
        keys, values = known.copies(self.slots, count)
        _, kv_heads, _, head_dim = keys.shape
        attended, _ = _flash(queries.view(count, kv_heads, -1, head_dim), keys, values, self.mask)
        return attended.reshape(count, -1)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Several tokens of a sequence, its last so far."""

    rows: slice
    slots: _Slots

    def attend(self, queries: torch.Tensor, known: CachedLayer) -> torch.Tensor:
        count = len(queries)
        keys, values = _known(known, self.slots)
        states = queries.view(1, count, -1, keys.shape[-1]).transpose(1, 2)  # [1, heads, count, head_dim]
        earlier = keys.shape[2] - count
        own, own_sum = _flash(states, keys[:, :, earlier:], values[:, :, earlier:], is_causal=True)
        if not earlier:
            return own.transpose(1, 2).reshape(count, -1)
        # All tokens see all that came before the chunk, without a mask. The two halves count by their sums of weights.
        before, before_sum = _flash(states, keys[:, :, :earlier], values[:, :, :earlier])
        share = torch.sigmoid(before_sum - own_sum).transpose(1, 2)[..., None]  # [1, count, heads, 1]
        merged = torch.lerp(own.transpose(1, 2).float(), before.transpose(1, 2).float(), share)
        return merged.to(queries.dtype).view(count, -1)


@dataclass(frozen=True, slots=True)
class _NativeChunk:
    """Several tokens of a sequence, its last so far, by the native kernel, which reads the cache by blocks."""

    rows: slice
    span: Span
    heads: Heads
    block_size: int

    def attend(self, queries: torch.Tensor, known: CachedLayer) -> torch.Tensor:
        keys, values = known.rows.chunk(2, dim=1)
        length, blocks = self.span.length, self.span.blocks
        return tile_attention.attend(
            queries, keys, values, self.heads, length=length, blocks=blocks, block_size=self.block_size, causal=True
        )


@cache
def can_attend(dtype: torch.dtype) -> bool:
    """Return whether the kernel can be called here for numbers of this type: it is tried out, with two heads a key."""
    states = torch.arange(2 * 3 * 8).view(1, 2, 3, 8).div(48).to(dtype)
    keys = states[:, :1]
    expected = functional.scaled_dot_product_attention(states, keys, keys, is_causal=True, enable_gqa=True)
    try:
        found, sums = _flash(states, keys, keys, is_causal=True)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
    return sums.shape == (1, 2, 3) and torch.allclose(found, expected, atol=0.02)


def _flash(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attended values, shaped as the queries, and the logarithms of the sums of weights, [batch, heads, tokens].

    All are [batch, heads, tokens, head_dim], with fewer heads of keys and values where several queries share them.
    """
    found: tuple[torch.Tensor, torch.Tensor] = _operator()(queries, keys, values, 0.0, is_causal, attn_mask=mask)
    return found


def _operator() -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _known(known: CachedLayer, slots: _Slots) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a sequence's keys and values, [1, kv_heads, length, head_dim] each; in place where they are a run."""
    return known.run(*slots) if isinstance(slots, tuple) else known.copies(slots, 1)


def _slots_of(span: Span, block_size: int) -> _Slots:
    blocks = span.blocks.numpy()
    if (np.diff(blocks) == 1).all():
        first = int(blocks[0]) * block_size
        return first, first + span.length
    return torch.from_numpy(_slot_numbers(blocks, span.length, block_size))


def _slot_numbers(tables: np.ndarray, length: int, block_size: int) -> np.ndarray:
    """Return the slots of the first `length` tokens, int64 [..., length], for block tables [..., blocks]."""
    index = np.arange(length)
    slots: np.ndarray = tables[..., index // block_size] * block_size + index % block_size
    return slots


def _chunk_of(span: Span, config: DecoderConfig, cache: KVCache) -> "_Part":
    """Return how a chunk of a prompt is attended to."""
    rows, heads = slice(span.start, span.end), Heads(config.num_heads, config.num_kv_heads, config.head_dim)
    if tile_attention.can_attend(cache.layer(0).rows, heads):
        return _NativeChunk(rows, span, heads, cache.block_size)
    return _Chunk(rows, _slots_of(span, cache.block_size))


def _parts_of(singles: Sequence[Span], config: DecoderConfig, cache: KVCache) -> list["_Part"]:
    """Return how single tokens are attended to: all at once by the native kernel, or in groups by torch's."""
    native = kernels() if can_attend_natively(config, cache) else None
    if native is None:
        return [_part_of(group, cache.block_size) for group in _grouped(singles)]
    in_order = sorted(singles, key=lambda span: span.start)
    return [_Native(native.attend_to_cache, config, cache.block_size, in_order)] if singles else []


def can_attend_natively(config: DecoderConfig, cache: KVCache) -> bool:
    """Return whether the native kernel takes these shapes; see `decoding.c`."""
    fits = config.head_dim % 32 == 0 and config.num_heads <= 16 * config.num_kv_heads and cache.block_size % 16 == 0
    return fits and cache.dtype == torch.bfloat16


def _grouped(singles: Sequence[Span]) -> list[list[Span]]:
    """Return spans of one token in groups of similar length; those that are better off alone, alone."""
    groups: list[list[Span]] = []
    for span in sorted(singles, key=lambda span: span.length):
        if groups and span.length <= min(_TOGETHER_UP_TO, _PADDING * groups[-1][0].length + 64):
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


def _part_of(group: Sequence[Span], block_size: int) -> _Part:
    """Return how the single tokens of a group are attended to."""
    if len(group) == 1:
        return _Single(slice(group[0].start, group[0].end), _slots_of(group[0], block_size))
    group = sorted(group, key=lambda span: span.start)
    longest = max(group, key=lambda span: span.length)
    tables = np.zeros((len(group), len(longest.blocks)), np.int64)
    for table, span in zip(tables, group, strict=True):
        table[: len(span.blocks)] = span.blocks.numpy()
    slots = _slot_numbers(tables, longest.length, block_size)
    beyond = np.arange(longest.length) >= np.array([[span.length] for span in group])
    slots = np.where(beyond, slots[:, :1], slots)
    mask = torch.from_numpy(np.where(beyond, np.float32(-np.inf), np.float32(0)))[:, None, None]
    return _Together(_rows_of(group), torch.from_numpy(slots.reshape(-1)), mask if beyond.any() else None)


def _rows_of(group: Sequence[Span]) -> slice | torch.Tensor:
    starts = [span.start for span in group]
    if all(after - before == 1 for before, after in pairwise(starts)):
        return slice(starts[0], starts[-1] + 1)
    return torch.tensor(starts)
