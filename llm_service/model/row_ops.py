"""Norm, activation and rotation of a batch's rows: by native kernels for bfloat16 on a CPU, else by torch's operators.

The roundings are the same. With a row or some, calling torch's operators takes longer than all that they do.
"""

import torch
from torch.nn import functional

from shared.native.library import Kernels, kernels


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the root mean square norm of [rows, size], computed in float32 and scaled after casting back.

    That is the order of the reference.
    """
    native = _kernels_for(hidden)
    if native is None:
        # Without the weight: torch would scale before casting back.
        return functional.rms_norm(hidden, weight.shape, None, eps).mul_(weight)
    rows, size = hidden.shape
    normed = torch.empty((rows, size), dtype=hidden.dtype)
    native.rms_norm(hidden.data_ptr(), hidden.stride(0), weight.data_ptr(), eps, normed.data_ptr(), rows, size)
    return normed


def silu_and_multiply(gates_and_ups: torch.Tensor) -> torch.Tensor:
    """Return silu(gates) * ups, [rows, size], of [rows, 2 * size]."""
    native = _kernels_for(gates_and_ups)
    if native is None or not gates_and_ups.is_contiguous():
        gates, ups = gates_and_ups.chunk(2, dim=-1)
        return functional.silu(gates).mul_(ups)
    rows, size = gates_and_ups.shape[0], gates_and_ups.shape[1] // 2
    outputs = torch.empty((rows, size), dtype=gates_and_ups.dtype)
    native.silu_and_multiply(gates_and_ups.data_ptr(), outputs.data_ptr(), rows, size)
    return outputs


def rotate_(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate states [rows, heads * head_dim] in place by cos and sin [rows, 1, 2, head_dim / 2], as in `Rotation`."""
    rows, half = len(states), cos.shape[-1]
    native = _kernels_for(states)
    if native is None:
        halves = states.view(rows, -1, 2, half)
        swapped = halves.flip(2)
        halves.mul_(cos).addcmul_(swapped, sin)
        return
    heads = states.shape[1] // (2 * half)
    native.rotate(states.data_ptr(), states.stride(0), cos.data_ptr(), sin.data_ptr(), rows, heads, half)


def _kernels_for(rows: torch.Tensor) -> Kernels | None:
    """Return the kernels where they can work on these rows."""
    if rows.dtype != torch.bfloat16 or rows.device.type != "cpu" or rows.ndim != 2 or rows.stride(1) != 1:
        return None
    return kernels()
