"""Linear layers whose matrices oneDNN keeps in an order of its own: for bfloat16 on CPUs.

Imports torch, so it is for services with a model only. The operators are private to torch, and used nowhere else. Where
they are missing or refuse, layers stay as they are.
"""

from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from shared.few_rows import FewRowsMatrix


class PackedLinear(nn.Module):
    """A linear layer, with an exact GELU behind it where asked for; it has no matrix until `hold` is called.

    Returns what `nn.Linear` returns; with the GELU a rounding between the two is left out.
    """

    bias: nn.Parameter | None

    def __init__(self, bias: nn.Parameter | None, rows: int, gelu: bool = False) -> None:
        """`rows` is how many inputs there usually are in a call: any number is right, near ones are fastest."""
        super().__init__()
        self.register_parameter("bias", bias)
        self._rows = rows
        self._activation = "gelu" if gelu else "none"
        self._matrix: torch.Tensor | None = None
        self._matrix_bytes = 0
        self._few_rows: FewRowsMatrix | None = None

    @property
    def matrix_bytes(self) -> int:
        """Memory of the matrix, which is none of the module's parameters."""
        return self._matrix_bytes

    @property
    def has_kernel(self) -> bool:
        """Whether products with few rows are the native kernel's."""
        return self._few_rows is not None

    @property
    def kernel_address(self) -> int:
        """Where the matrix lies, in the order that the native kernel reads; only where there `has_kernel`."""
        assert self._few_rows is not None
        return self._few_rows.address

    def hold(self, matrix: torch.Tensor) -> None:
        """Take a matrix [outputs, inputs] over; keeps nothing of it but the reordered copy."""
        self._matrix = _operators()._reorder_linear_weight(matrix, self._rows)
        self._matrix_bytes = matrix.nbytes
        if self._activation == "none":
            self._few_rows = FewRowsMatrix.of(self._matrix, matrix)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return [..., outputs] for [..., inputs]."""
        if self._few_rows is not None and self._few_rows.takes(inputs):
            return self._few_rows.product(inputs, self.bias)
        outputs: torch.Tensor = _operators()._linear_pointwise(
            inputs, self._matrix, self.bias, self._activation, [], "none"
        )
        return outputs

    def write(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Write what `forward` returns to `outputs`, of which rows may lie apart."""
        if self._few_rows is not None and self._few_rows.takes(inputs):
            self._few_rows.write(inputs, outputs, self.bias)
        else:
            outputs.copy_(self(inputs))

    def added(self, inputs: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Return the layer's outputs plus `other` of their shape, rounded once. Not for a layer with a GELU."""
        if self._few_rows is not None and self._few_rows.takes(inputs):
            return self._few_rows.product(inputs, self.bias, other)
        outputs: torch.Tensor = _operators()._linear_pointwise.binary(inputs, other, self._matrix, self.bias, "add")
        return outputs


def added(linear: nn.Module, inputs: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return what a linear layer of any kind makes of the inputs, plus `other`."""
    if isinstance(linear, PackedLinear):
        return linear.added(inputs, other)
    outputs: torch.Tensor = linear(inputs)
    return outputs.add_(other)


def pack_linears(
    model: nn.Module, rows: int, chosen: Callable[[str, nn.Linear], bool]
) -> Mapping[str, Callable[[torch.Tensor], None]]:
    """Replace the linear layers that are `chosen`, by path; return, by their matrices' names, what takes each.

    A `nn.GELU` that follows in the same module becomes part of its layer.
    """
    holders: dict[str, Callable[[torch.Tensor], None]] = {}
    for path, owner in list(model.named_modules()):
        for (name, linear), (next_name, follower) in pairwise([*owner.named_children(), ("", None)]):
            full = f"{path}.{name}".removeprefix(".")
            if not isinstance(linear, nn.Linear) or not chosen(full, linear):
                continue
            gelu = isinstance(follower, nn.GELU) and follower.approximate == "none"
            packed = PackedLinear(linear.bias, rows, gelu)
            setattr(owner, name, packed)
            if gelu:
                setattr(owner, next_name, nn.Identity())
            holders[f"{full}.weight"] = packed.hold
    return holders


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether layers can be packed here; in float32 nothing would be gained by it."""
    return device.type == "cpu" and dtype == torch.bfloat16 and _operators_work()


@cache
def _operators_work() -> bool:
    """Try them out: that they exist does not say that this processor can run them."""
    try:
        if not _operators()._is_mkldnn_bf16_supported():
            return False
        eights = torch.full((1, 32), 8.0, dtype=torch.bfloat16)
        layer, plain = PackedLinear(None, rows=1, gelu=True), PackedLinear(None, rows=16)
        for one in (layer, plain):
            one.hold(torch.eye(32, dtype=torch.bfloat16))
        return torch.equal(layer(eights), eights) and torch.equal(plain.added(eights, eights), 2 * eights)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


def _operators() -> Any:
    return torch.ops.mkldnn
