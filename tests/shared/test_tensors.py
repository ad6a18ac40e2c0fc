"""A device or element type that a setting names is the one that is used, or a line that says why not."""

import pytest
import torch

from shared.errors import CheckpointError
from shared.tensors import resolve_device, resolve_dtype


def test_auto_takes_what_there_is() -> None:
    device = resolve_device("auto")
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_dtype("auto", torch.device("cpu")) is torch.float32
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cdua", "cuda:999", "cuda:x", "gpu", "", "meta"])
def test_a_device_that_is_not_there_is_named_in_one_line(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"^--device {name}: [^\n]+$"):
        resolve_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_named_in_one_line() -> None:
    with pytest.raises(CheckpointError, match=r"^--device cuda: there is no such GPU here"):
        resolve_device("cuda")
