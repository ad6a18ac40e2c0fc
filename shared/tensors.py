"""Raw embedding bytes to torch tensors and back. torch is imported where it is used, so the gateway never needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.embedding import DataType, Embedding
from shared.errors import CheckpointError

if TYPE_CHECKING:
    import torch


def tensor_of(embedding: Embedding) -> torch.Tensor:
    """Return the embedding as a tensor [tokens, hidden] that shares its memory; it must not be written to."""
    import torch

    data_type = getattr(torch, embedding.info.data_type)
    flat = torch.frombuffer(embedding.payload, dtype=data_type)
    return flat.view(embedding.info.token_count, embedding.info.hidden_size)


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
