"""Raw embedding bytes to torch tensors and back. torch is imported where it is used, so the gateway never needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shared.embedding import SCALE_BYTES, DataType, Embedding
from shared.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_LARGEST: Final = 127.0  # -128 stays unused, so that a row and its negative are rounded alike


def tensor_of(embedding: Embedding, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return the embedding as a tensor [tokens, hidden] of `dtype`; None: as it is stored, or float32 for `int8_rows`.

    It must not be written to: where nothing has to be converted it shares the embedding's memory.
    """
    import torch

    info = embedding.info
    if info.data_type == "int8_rows":
        packed = torch.frombuffer(embedding.payload, dtype=torch.uint8).view(info.token_count, info.row_bytes)
        return unpack_rows(packed, dtype or torch.float32)
    flat = torch.frombuffer(embedding.payload, dtype=getattr(torch, info.data_type))
    return flat.view(info.token_count, info.hidden_size).to(dtype or flat.dtype)


def pack_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return float rows [tokens, hidden] as `int8_rows`: uint8 [tokens, hidden + 4], on the same device.

    A row's numbers become whole multiples, -127 to 127, of a 127th of its largest; halves are rounded to even. A row
    with a number that is not finite stays without any finite one.
    """
    import torch

    exact = rows.detach().float()
    scales = exact.abs().amax(dim=1, keepdim=True) / _LARGEST  # [tokens, 1]
    multiples = (exact / scales.where(scales > 0, 1.0)).round().clamp(-_LARGEST, _LARGEST).nan_to_num(1.0)
    return torch.cat([multiples.to(torch.int8).view(torch.uint8), scales.contiguous().view(torch.uint8)], dim=1)


def unpack_rows(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the rows [tokens, hidden] of `int8_rows`, uint8 [tokens, hidden + 4], as floats."""
    import torch

    multiples = packed[:, :-SCALE_BYTES].view(torch.int8)
    # A copy, because in their rows the scales need not lie where a float32 may.
    scales = packed[:, -SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return (multiples.float() * scales).to(dtype)


def bytes_of(*pieces: torch.Tensor) -> memoryview:
    """Return the raw row-major bytes of tensors [rows, hidden], one after another; may be written to.

    A copy, made by torch and not by Python: of hundreds of MiB, Python's would hold up all threads of the process.
    """
    import torch

    rows = torch.cat([piece.detach().cpu() for piece in pieces]).contiguous()
    return rows.view(torch.uint8).flatten().numpy().data


def data_type_of(tensor: torch.Tensor) -> DataType:
    """Return the name of the tensor's element type."""
    name = str(tensor.dtype).removeprefix("torch.")
    assert name in ("float32", "float16", "bfloat16")
    return name  # type: ignore[return-value]  # narrowed by the assertion, which mypy cannot follow


def resolve_device(name: str) -> torch.device:
    """Return the torch device of a setting; `auto` is the first GPU where there is one.

    Raises `CheckpointError` where torch knows no such device or cannot use it here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CheckpointError(f"--device {name}: there is no such device; cpu, cuda and cuda:1 are examples.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CheckpointError(f"--device {name}: there is no such GPU here.")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:  # torch asserts that it was built for it
        raise CheckpointError(f"--device {name}: torch cannot use it here ({type(error).__name__}).") from None
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the torch dtype of a setting; `auto` is float32 on a CPU and bfloat16 elsewhere."""
    import torch

    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
