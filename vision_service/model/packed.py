"""Linear layers whose matrices oneDNN keeps in an order of its own: for bfloat16 on CPUs.

The operators are private to torch, and used nowhere else. Where they are missing or refuse, layers stay as they are.
"""

from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import nn


class PackedLinear(nn.Module):
    """A linear layer, with an exact GELU behind it where asked for; it has no matrix until `hold` is called.

    Returns what `nn.Linear` returns; with the GELU a rounding between the two is left out.
    """

    bias: nn.Parameter | None

    def __init__(self, bias: nn.Parameter | None, rows: int, gelu: bool) -> None:
        """`rows` is how many inputs there usually are in a call: any number is right, near ones are fastest."""
        super().__init__()
        self.register_parameter("bias", bias)
        self._rows = rows
        self._activation = "gelu" if gelu else "none"
        self._matrix: torch.Tensor | None = None

    def hold(self, matrix: torch.Tensor) -> None:
        """Take a matrix [outputs, inputs] over; keeps nothing of it but the reordered copy."""
        self._matrix = _operators()._reorder_linear_weight(matrix, self._rows)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return [..., outputs] for [..., inputs]."""
        outputs: torch.Tensor = _operators()._linear_pointwise(
            inputs, self._matrix, self.bias, self._activation, [], "none"
        )
        return outputs


def pack_linears(model: nn.Module, rows: int) -> Mapping[str, Callable[[torch.Tensor], None]]:
    """Replace the linear layers of a model that are faster packed; return, by their matrices' names, what takes each.

    A `nn.GELU` that follows in the same module becomes part of its layer. Matrices with more inputs than outputs stay:
    torch multiplies by them faster as they are.
    """
    holders: dict[str, Callable[[torch.Tensor], None]] = {}
    for path, owner in list(model.named_modules()):
        for (name, linear), (next_name, follower) in pairwise([*owner.named_children(), ("", None)]):
            if not isinstance(linear, nn.Linear) or linear.in_features > linear.out_features:
                continue
            gelu = isinstance(follower, nn.GELU) and follower.approximate == "none"
            packed = PackedLinear(linear.bias, rows, gelu)
            setattr(owner, name, packed)
            if gelu:
                setattr(owner, next_name, nn.Identity())
            holders[f"{path}.{name}.weight".removeprefix(".")] = packed.hold
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
        layer = PackedLinear(None, rows=1, gelu=True)
        layer.hold(torch.eye(32, dtype=torch.bfloat16))
        return torch.equal(layer(torch.full((1, 32), 8.0, dtype=torch.bfloat16)), torch.full((1, 32), 8.0).bfloat16())
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


def _operators() -> Any:
    return torch.ops.mkldnn
