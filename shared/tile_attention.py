"""Attention of many rows by a native kernel (`shared/native/attention.c`): pictures' tiles, and chunks of prompts.

Imports torch, so it is for services with a model only.
"""

from dataclasses import dataclass
from typing import Final

import torch

from shared.native.library import kernels

_STEP: Final = 32  # numbers of a head are a multiple of it
_MOST: Final = 256


@dataclass(frozen=True, slots=True)
class Heads:
    """How rows are divided: query head h has the keys and values of head h / (queries / keys)."""

    queries: int
    keys: int
    size: int


def can_attend(tensor: torch.Tensor, heads: Heads) -> bool:
    """Return whether `attend` can work on tensors of this type and place."""
    fits = heads.size % _STEP == 0 and heads.size <= _MOST and heads.queries % heads.keys == 0
    return fits and tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and kernels() is not None


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    heads: Heads,
    *,
    length: int | None = None,
    blocks: torch.Tensor | None = None,
    block_size: int = 0,
    causal: bool = False,
) -> torch.Tensor:
    """Return [rows, heads * size] for queries of that shape and for keys and values [keys, key heads * size].

    All are bfloat16, their rows wherever their strides say. With `blocks`, int64, keys and values are in blocks of
    `block_size` rows, in that order, and there are `length` of them. The last query sees all keys; where `causal`, each
    before it sees one less.
    """
    native = kernels()
    assert native is not None  # the caller has asked `can_attend`
    outputs = torch.empty(queries.shape, dtype=queries.dtype)
    native.attend(
        queries.data_ptr(),
        queries.stride(0),
        keys.data_ptr(),
        keys.stride(0),
        values.data_ptr(),
        values.stride(0),
        None if blocks is None else blocks.data_ptr(),
        block_size,
        len(queries),
        len(keys) if length is None else length,
        heads.queries,
        heads.keys,
        heads.size,
        causal,
        heads.size**-0.5,
        outputs.data_ptr(),
    )
    return outputs
