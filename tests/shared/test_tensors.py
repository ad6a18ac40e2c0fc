"""Tensors become bytes and come back; a device or type that a setting names is used, or a line says why not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from shared.embedding import DataType, Embedding, EmbeddingInfo
from shared.errors import CheckpointError
from shared.tensors import bytes_of, data_type_of, pack_rows, resolve_device, resolve_dtype, tensor_of, unpack_rows
from tests.golden_cases import ALL_CHECKPOINTS, GOLDEN
from tests.shared.stored import KEY


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


def embedding_of(stored: torch.Tensor, data_type: DataType, hidden: int) -> Embedding:
    info = EmbeddingInfo(1, len(stored), hidden, data_type, 1, 1, 1, 1)
    return Embedding(KEY, info, bytes_of(stored))


@pytest.mark.parametrize("data_type", ["float32", "float16", "bfloat16"])
def test_tensors_come_back_bit_for_bit(data_type: DataType) -> None:
    tensor = torch.randn(12, 8).to(getattr(torch, data_type))
    assert data_type_of(tensor) == data_type
    assert torch.equal(tensor_of(embedding_of(tensor, data_type, 8)), tensor)
    assert torch.equal(tensor_of(embedding_of(tensor, data_type, 8), torch.float32), tensor.float())


def test_a_tensor_of_the_wanted_type_shares_the_embeddings_memory() -> None:
    stored = embedding_of(torch.zeros(2, 4), "float32", 4)
    memoryview(stored.payload)[0] = 1  # type: ignore[index]  # a copy of torch's, and ours to write to
    assert tensor_of(stored, torch.float32)[0, 0] != 0


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 9),
    hidden=st.sampled_from([1, 4, 7, 64]),
    power=st.integers(-30, 30),
)
def test_rounded_rows_are_within_half_a_step_and_their_largest_is_kept(
    seed: int, tokens: int, hidden: int, power: int
) -> None:
    rows = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    packed = pack_rows(rows)
    assert packed.shape == (tokens, hidden + 4)
    back = tensor_of(embedding_of(packed, "int8_rows", hidden))
    step = rows.abs().amax(dim=1, keepdim=True) / 127
    assert ((back - rows).abs() <= step * 0.5001).all()
    assert torch.allclose(back.abs().amax(dim=1), rows.abs().amax(dim=1), rtol=1e-6)
    assert torch.equal(unpack_rows(pack_rows(-rows), torch.float32), -back), "a row and its negative alike"
    assert torch.equal(unpack_rows(pack_rows(back), torch.float32), back), "rounding twice changes nothing"


def test_halves_are_rounded_to_even() -> None:
    rows = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert unpack_rows(pack_rows(rows), torch.float32).tolist() == [[127.0, 0.0, 2.0, 2.0, 0.0, -2.0]]


def test_a_row_of_zeros_stays_one_and_one_that_is_not_finite_never_becomes_finite() -> None:
    rows = torch.tensor([[0.0, 0.0], [1.0, float("nan")], [1.0, float("inf")], [-float("inf"), 0.0], [3.0, -1.0]])
    back = unpack_rows(pack_rows(rows), torch.float32)
    assert back[0].tolist() == [0.0, 0.0]
    assert not back[1:4].isfinite().any()
    assert back[4].isfinite().all()
    assert not unpack_rows(pack_rows(rows.bfloat16()), torch.bfloat16)[1:4].isfinite().any()


@pytest.mark.parametrize("checkpoint", ALL_CHECKPOINTS)
def test_what_the_models_make_hardly_changes_by_rounding(checkpoint: str) -> None:
    expected = load_file(GOLDEN / "expected" / checkpoint / "vision_and_logits.safetensors")
    rows = expected["single_image.visual_embeds"].flatten(0, 1).float()
    back = unpack_rows(pack_rows(rows), torch.float32)
    assert torch.nn.functional.cosine_similarity(rows, back, dim=1).min() > 0.9999
    assert ((back - rows).norm(dim=1) / rows.norm(dim=1)).max() < 0.011
    assert ((back - rows).abs().amax(dim=1) / rows.abs().amax(dim=1)).max() < 0.004
