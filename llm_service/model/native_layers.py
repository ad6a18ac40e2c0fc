"""All layers of a decoder and its last norm in one native call, for steps of a single new token of a few sequences."""

from collections.abc import Sequence
from itertools import chain
from typing import Final, Self

import numpy as np
import torch
from torch import nn

from llm_service.model.attention import BatchLayout, KnownTokens, KVCache
from llm_service.model.config import DecoderConfig
from llm_service.model.cpu_attention import can_attend_natively
from llm_service.model.rope import Rotation
from shared.few_rows import MOST_ROWS
from shared.native.library import Kernels, kernels
from shared.packed_linear import PackedLinear

_ADDRESSES: Final = 11  # of a layer, in the order of `layers.c`


class NativeLayers:
    """A decoder's layers over one cache, and its last norm. They compute what they compute one by one, bit for bit."""

    def __init__(
        self, native: Kernels, config: DecoderConfig, cache: KVCache, layers: Sequence[nn.Module], norm: torch.Tensor
    ) -> None:
        self._native, self._config = native, config
        self._norm = norm
        self._cache = cache  # keeps the memory
        addresses = [_addresses_of(layer, cache, index) for index, layer in enumerate(layers)]
        self._layers = np.array(addresses, np.int64)
        self._sizes = np.array(
            (
                *(config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads),
                *(config.head_dim, cache.block_size),
            ),
            np.int64,
        )

    @classmethod
    def of(cls, config: DecoderConfig, cache: KVCache, layers: Sequence[nn.Module], norm: torch.Tensor) -> Self | None:
        """Return the layers for a cache, or None where something in them is not for the native kernels.

        `norm` [hidden] is the weight of the norm behind them.
        """
        native = kernels()
        if native is None or not can_attend_natively(config, cache):
            return None
        modules = list(chain.from_iterable(layer.modules() for layer in layers))
        weights = chain((norm,), *(module.parameters(recurse=False) for module in modules))
        plain = any(isinstance(module, nn.Linear) for module in modules)
        packed = [module for module in modules if isinstance(module, PackedLinear)]
        fits = all(weight.dtype == torch.bfloat16 and weight.device.type == "cpu" for weight in weights)
        if plain or not fits or len(packed) != 4 * len(layers) or not all(one.has_kernel for one in packed):
            return None
        return cls(native, config, cache, layers, norm)

    def take(self, layout: BatchLayout) -> bool:
        """Whether `forward` can compute a batch."""
        return len(layout.spans) <= MOST_ROWS and all(span.count == 1 for span in layout.spans)

    def forward(self, hidden: torch.Tensor, rotation: Rotation, layout: BatchLayout) -> torch.Tensor:
        """Return final hidden states for [tokens, hidden], which are written over; the cache is written to, too."""
        config, known = self._config, KnownTokens.of(layout.spans)
        self._native.decode_layers(
            hidden.data_ptr(),
            len(layout.spans),
            self._layers.ctypes.data,
            len(self._layers),
            self._norm.data_ptr(),
            self._sizes.ctypes.data,
            config.norm_eps,
            config.head_dim**-0.5,
            rotation.cos.data_ptr(),
            rotation.sin.data_ptr(),
            layout.slots.data_ptr(),
            *known.addresses,
        )
        return hidden


def _addresses_of(layer: nn.Module, cache: KVCache, index: int) -> tuple[int, ...]:
    attention, mlp = layer.get_submodule("attention"), layer.get_submodule("mlp")
    found = (
        layer.get_parameter("attention_norm.weight").data_ptr(),
        *_packed(attention.get_submodule("qkv")),
        *_packed(attention.get_submodule("out")),
        layer.get_parameter("mlp_norm.weight").data_ptr(),
        *_packed(mlp.get_submodule("gate_up")),
        *_packed(mlp.get_submodule("down")),
        cache.layer(index).rows.data_ptr(),
    )
    assert len(found) == _ADDRESSES
    return found


def _packed(module: nn.Module) -> tuple[int, int]:
    """Return where a layer's matrix and bias are; 0 where it has no bias."""
    assert isinstance(module, PackedLinear)
    return module.kernel_address, 0 if module.bias is None else module.bias.data_ptr()
