"""Products of packed matrices with few rows at the speed of memory, by a native kernel (`shared/native/few_rows.c`).

For processors with matrix units, and where the kernel was compiled; elsewhere there is none, and oneDNN multiplies.
Imports torch, so it is for services with a model only.
"""

import ctypes
from typing import Final, Self

import torch

from shared.native.library import Function, kernels

MOST_ROWS: Final = 32
_BLOCK: Final = 32  # outputs of a block


class FewRowsMatrix:
    """A matrix [outputs, inputs] in the order that oneDNN has given it: for products with up to `MOST_ROWS` rows."""

    def __init__(self, kernel: Function, packed: torch.Tensor, shape: tuple[int, int]) -> None:
        self._kernel = kernel
        self._packed = packed  # keeps the memory
        self.address: Final = _address_of(packed)
        self._num_outputs, self._num_inputs = shape

    @classmethod
    def of(cls, packed: torch.Tensor, matrix: torch.Tensor) -> Self | None:
        """Return the kernel's view of `packed`, made from `matrix`; None where it has no kernel or another order."""
        native = kernels()
        if native is None or not _is_in_order(packed, matrix):
            return None
        return cls(native.few_rows_linear, packed, (matrix.shape[0], matrix.shape[1]))

    def takes(self, inputs: torch.Tensor) -> bool:
        """Whether `product` can multiply these."""
        return inputs.ndim == 2 and 1 <= inputs.shape[0] <= MOST_ROWS and inputs.stride(1) == 1

    def product(
        self, inputs: torch.Tensor, bias: torch.Tensor | None, added: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return [rows, outputs] for [rows, inputs]: the product, plus `bias` [outputs], plus `added`, rounded once."""
        outputs = torch.empty((inputs.shape[0], self._num_outputs), dtype=torch.bfloat16)
        self.write(inputs, outputs, bias, added)
        return outputs

    def write(
        self,
        inputs: torch.Tensor,
        outputs: torch.Tensor,
        bias: torch.Tensor | None = None,
        added: torch.Tensor | None = None,
    ) -> None:
        """Write what `product` returns to bfloat16 `outputs` [rows, outputs], of which rows may lie apart."""
        self._kernel(
            inputs.data_ptr(),
            inputs.stride(0),
            self.address,
            None if bias is None else bias.data_ptr(),
            None if added is None else added.data_ptr(),
            0 if added is None else added.stride(0),
            outputs.data_ptr(),
            outputs.stride(0),
            inputs.shape[0],
            self._num_outputs,
            self._num_inputs,
        )


def _is_in_order(packed: torch.Tensor, matrix: torch.Tensor) -> bool:
    """Return whether the first and the last block of a packed matrix are where the kernel looks for them."""
    num_outputs, num_inputs = matrix.shape
    num_blocks, width = -(-num_outputs // _BLOCK), -(-num_inputs // _BLOCK) * _BLOCK
    size = num_blocks * _BLOCK * width
    try:
        num_bytes = int(torch.ops.mkldnn._nbytes(packed))
        found = torch.frombuffer((ctypes.c_char * num_bytes).from_address(_address_of(packed)), dtype=torch.bfloat16)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    if num_bytes != size * found.element_size():
        return False
    for block in {0, num_blocks - 1}:
        rows = matrix[block * _BLOCK : (block + 1) * _BLOCK]
        wanted = torch.zeros((_BLOCK, width), dtype=torch.bfloat16)
        wanted[: len(rows), :num_inputs] = rows
        pairs = wanted.view(_BLOCK, -1, 2).transpose(0, 1).reshape(-1)
        if not torch.equal(found[block * _BLOCK * width : (block + 1) * _BLOCK * width], pairs):
            return False
    return True


def _address_of(packed: torch.Tensor) -> int:
    return int(torch.ops.mkldnn.data_ptr(packed))
