"""Matrices kept in fewer bits: how they are rounded and how they are multiplied by, with the kernels of bitsandbytes.

torch and bitsandbytes are imported where they are used.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import prod
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from shared.checkpoint import Checkpoint
from shared.errors import CheckpointError
from shared.weights import WeightPlan, read_weights

if TYPE_CHECKING:
    import torch
    from torch import nn

Quantization = Literal["none", "int8", "nf4"]

_LEVELS: Final = 127  # of int8, on either side of zero
_BLOCK: Final = 64  # numbers of a row that share a scale
_PIECE_NUMBERS: Final = 1 << 20  # rounding takes some 20 bytes for each of these
_importing = Lock()


class Scheme(Protocol):
    """A way to keep a matrix in fewer bits. Inputs are not rounded, so that no row of a batch changes another."""

    @property
    def identity(self) -> str:
        """What outputs are computed with; another text wherever outputs may differ."""

    def size_bytes(self, rows: int, columns: int) -> int:
        """Return the memory of a matrix and its scales."""

    def empty(self, rows: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return memory for the values and the scales of a matrix."""

    def round(self, matrix: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> None:
        """Fill in values and scales of a matrix [rows, columns] of 16-bit or float32 numbers on the same device.

        Takes some megabytes besides.
        """

    def multiply(
        self, inputs: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return [..., rows] in the inputs' type, for inputs [..., columns] and a bias [rows] of the same type.

        May take the memory of the matrix in that type for as long as it runs.
        """


class Int8:
    """A byte per number and a float32 scale per row, as LLM.int8 keeps them."""

    identity = "int8 rows"

    def size_bytes(self, rows: int, columns: int) -> int:
        """Return the memory of a matrix and its scales."""
        return rows * columns + 4 * rows

    def empty(self, rows: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return int8 [rows, columns] and float32 [rows, 1]."""
        import torch

        values = torch.empty((rows, columns), dtype=torch.int8, device=device)
        return values, torch.empty((rows, 1), dtype=torch.float32, device=device)

    def round(self, matrix: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> None:
        """Fill in values and scales."""
        for rows in _pieces(matrix):
            values[rows], largest, _ = _kernels().int8_vectorwise_quant(matrix[rows].half())
            scales[rows, 0] = largest / _LEVELS

    def multiply(
        self, inputs: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return [..., rows]."""
        import torch
        from torch.nn import functional

        matrix = torch.empty(values.shape, dtype=inputs.dtype, device=values.device)
        torch.mul(values, scales, out=matrix)
        return functional.linear(inputs, matrix, bias)


class Nf4:
    """Four bits per number, the quantiles of a normal distribution, and a float32 scale for every 64 of a row."""

    identity = "nf4 blocks of 64"

    def size_bytes(self, rows: int, columns: int) -> int:
        """Return the memory of a matrix and its scales."""
        blocks = rows * -(-columns // _BLOCK)
        return blocks * (_BLOCK // 2 + 4)

    def empty(self, rows: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return uint8 [rows, columns / 2] and float32 [rows, columns / 64], columns rounded up to a whole block.

        The library's blocks go on from row to row, and its CPU kernel then reads wrong scales for short rows.
        """
        import torch

        blocks = -(-columns // _BLOCK)
        values = torch.empty((rows, blocks * _BLOCK // 2), dtype=torch.uint8, device=device)
        return values, torch.empty((rows, blocks), dtype=torch.float32, device=device)

    def round(self, matrix: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> None:
        """Fill in values and scales."""
        from torch.nn import functional

        for rows in _pieces(matrix):
            whole = functional.pad(matrix[rows], (0, -matrix.shape[1] % _BLOCK))
            packed, largest = _kernels().quantize_4bit(whole, _BLOCK, "nf4", values.dtype)
            values[rows], scales[rows] = packed.view(len(whole), -1), largest.view(len(whole), -1)

    def multiply(
        self, inputs: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return [..., rows]."""
        from torch.nn import functional

        shape = [len(values), 2 * values.shape[1]]
        whole = functional.pad(inputs, (0, shape[1] - inputs.shape[-1])).contiguous()
        packed, largest = values.view(-1, 1), scales.view(-1)
        outputs: torch.Tensor = _kernels().gemm_4bit(whole, packed, shape, largest, _BLOCK, "nf4", bias)
        return outputs


_SCHEMES: Mapping[Quantization, Scheme] = {"int8": Int8(), "nf4": Nf4()}


def scheme_of(quantization: Quantization) -> Scheme | None:
    """Return the scheme of a setting; None where matrices are kept as they are.

    Raises `CheckpointError` where bitsandbytes is not installed.
    """
    if quantization == "none":
        return None
    if find_spec("bitsandbytes") is None:
        raise CheckpointError(f"--quantization {quantization}: install internvl-serving[quantization].")
    return _SCHEMES[quantization]


def quantize_linears(
    model: nn.Module, name: str, scheme: Scheme, device_of: Callable[[str], torch.device]
) -> Mapping[str, Callable[[torch.Tensor], None]]:
    """Give every linear layer below the submodule `name` a matrix of fewer bits, to come; biases stay as they are.

    `device_of` says by a matrix' name in the model where it goes. Returns, by these names, what takes each matrix
    [outputs, inputs], on its device; it keeps nothing of it but what it is rounded to. The memory for that is allocated
    here, before anything is read, so that what reading needs leaves no holes between.
    """
    from torch import nn

    holders: dict[str, Callable[[torch.Tensor], None]] = {}
    for path, linear in list(model.get_submodule(name).named_modules(prefix=name)):
        if isinstance(linear, nn.Linear):
            owner, _, attribute = path.rpartition(".")
            rows, columns = linear.weight.shape
            memory = scheme.empty(rows, columns, device_of(f"{path}.weight"))
            quantized = _linear_class()(linear.bias, scheme, *memory)
            setattr(model.get_submodule(owner), attribute, quantized)
            holders[f"{path}.weight"] = quantized.hold
    return holders


def read_and_round(
    model: nn.Module,
    submodule: str,
    scheme: Scheme | None,
    weights: ModelWeights,
    event: str,
    seen: Callable[[str, torch.Tensor], None] = lambda name, piece: None,
    takers: Mapping[str, Callable[[torch.Tensor], None]] = MappingProxyType({}),
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights that a model keeps as they are, by name, as `shared.weights.read_weights` reads them.

    The matrices of the linear layers below `submodule` are rounded into the model meanwhile and not yielded; without a
    scheme there are none. `takers` are what takes other matrices, by name, each valid during the call: they are not
    yielded either. Besides what is kept this takes some megabytes, and the largest matrix that is rounded or taken.
    """
    import torch

    shapes, dtype, device_of = weights.shapes, weights.dtype, weights.device_of
    holders = {**takers, **(quantize_linears(model, submodule, scheme, device_of) if scheme else {})}
    scratch = _Scratch((shapes[name] for name in holders), dtype)

    def new_weight(name: str) -> torch.Tensor:
        if name in holders:
            return scratch.matrix(shapes[name], device_of(name))
        return torch.empty(shapes[name], dtype=dtype, device=device_of(name))

    for name, weight in read_weights(weights.checkpoint, weights.plan, new_weight, event, seen):
        if name in holders:
            holders[name](weight)
        else:
            yield name, weight


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """Where a model's weights come from, and the shape, the type and the device of each, by its name in the model."""

    checkpoint: Checkpoint
    plan: WeightPlan
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    device_of: Callable[[str], torch.device]


class _Scratch:
    """Memory on each device for one matrix at a time, as it is before it is rounded."""

    def __init__(self, shapes: Iterable[tuple[int, ...]], dtype: torch.dtype) -> None:
        self._size = max(map(prod, shapes), default=0)
        self._dtype = dtype
        self._flat: dict[torch.device, torch.Tensor] = {}

    def matrix(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """Return an empty matrix, which takes the place of the one before."""
        import torch

        if device not in self._flat:
            self._flat[device] = torch.empty(self._size, dtype=self._dtype, device=device)
        return self._flat[device][: prod(shape)].view(shape)


@cache
def _linear_class() -> Any:
    from torch import nn

    class QuantizedLinear(nn.Module):
        """A linear layer whose matrix is kept as a scheme rounds it; it is none until `hold` is called."""

        bias: nn.Parameter | None
        values: torch.Tensor
        scales: torch.Tensor

        def __init__(
            self, bias: nn.Parameter | None, scheme: Scheme, values: torch.Tensor, scales: torch.Tensor
        ) -> None:
            super().__init__()
            self._scheme = scheme
            self.register_parameter("bias", bias)
            self.register_buffer("values", values, persistent=False)
            self.register_buffer("scales", scales, persistent=False)

        def hold(self, matrix: torch.Tensor) -> None:
            self._scheme.round(matrix, self.values, self.scales)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self._scheme.multiply(inputs, self.values, self.scales, self.bias)

    return QuantizedLinear


def _pieces(matrix: torch.Tensor) -> list[slice]:
    """Return the rows of a matrix in runs of some megabytes."""
    step = max(1, _PIECE_NUMBERS // matrix.shape[1])
    return [slice(start, start + step) for start in range(0, len(matrix), step)]


@cache
def _kernels() -> Any:
    """Return the library's operators.

    Where the package `kernels` is installed, the library would download a program and run it. It does not find that
    package here, and does not say that it misses it.
    """
    import torch

    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    with _importing:
        hidden = {"kernels": sys.modules["kernels"]} if "kernels" in sys.modules else {}
        sys.modules["kernels"] = None  # type: ignore[assignment]  # what makes an import fail
        try:
            import bitsandbytes  # noqa: F401  # registers the operators
        finally:
            del sys.modules["kernels"]
            sys.modules.update(hidden)
    return torch.ops.bitsandbytes
