"""Weights are put together row by row from the tensors that the plan names, with progress."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from structlog.testing import capture_logs

from shared.checkpoint import Checkpoint
from shared.errors import CheckpointError
from shared.weights import Part, WeightPlan, read_weights, stacked, unclaimed

SIZES = {"q": 6, "k": 2, "v": 2}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    rows = torch.arange(10 * 3, dtype=torch.bfloat16).view(10, 3)
    q, k, v = (part.clone() for part in rows.split([6, 2, 2]))
    tensors = {"v": v, "k": k, "q": q, "fused": rows, "bias": torch.arange(10.0), "ids": torch.arange(3)}
    save_file(tensors, directory / "model.safetensors")
    return directory


def read(checkpoint: Checkpoint, plan: WeightPlan, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    def new_weight(name: str) -> torch.Tensor:
        rows = sum(part.shape[0] for part in plan[name])
        return torch.full((rows, *plan[name][0].shape[1:]), torch.nan, dtype=dtype)

    return dict(read_weights(checkpoint, plan, new_weight, "loading"))


def test_stacked_tensors_stand_one_below_the_other(directory: Path) -> None:
    plan = {"qkv": stacked(SIZES, SIZES.values(), (3,))}
    weight = read(Checkpoint(directory), plan)["qkv"]
    assert torch.equal(weight, torch.arange(30.0).view(10, 3))


@given(order=st.permutations(range(5)), piece_bytes=st.integers(1, 100))
def test_runs_of_rows_go_where_the_plan_says(directory: Path, order: list[int], piece_bytes: int) -> None:
    runs = tuple(range(2 * place, 2 * place + 2) for place in order)
    plan = {
        "weight": (Part("fused", (10, 3), runs),),
        "bias": (Part("bias", (10,), runs),),
    }
    weights = read(Checkpoint(directory, piece_bytes), plan)
    expected = torch.empty(5, 2, 3)
    expected[order] = torch.arange(30.0).view(5, 2, 3)
    assert torch.equal(weights["weight"], expected.flatten(0, 1))
    places = torch.empty(5, 2)
    places[order] = torch.arange(10.0).view(5, 2)
    assert torch.equal(weights["bias"], places.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_converted_to_the_type_asked_for(directory: Path, dtype: torch.dtype) -> None:
    weights = read(Checkpoint(directory), {"bias": stacked(["bias"], [10], ())}, dtype)
    assert torch.equal(weights["bias"], torch.arange(10.0).to(dtype))


def test_weights_come_in_the_order_of_the_file(directory: Path) -> None:
    checkpoint = Checkpoint(directory)
    plan = {name: stacked([name], [count], (3,)) for name, count in SIZES.items()}
    stored = sorted(plan, key=lambda name: checkpoint.entries[name].begin)
    assert stored != list(plan)
    assert list(read(checkpoint, plan)) == stored


def test_progress_ends_with_all_tensors_and_bytes(directory: Path) -> None:
    with capture_logs() as logs:
        read(Checkpoint(directory), {"qkv": stacked(SIZES, SIZES.values(), (3,))})
    assert logs[-1] == {
        "event": "loading",
        "log_level": "info",
        "done_tensors": 3,
        "total_tensors": 3,
        "done_mib": 0,
        "total_mib": 0,
        "seconds_left": 0.0,
    }


@pytest.mark.parametrize(
    ("part", "named"),
    [
        (Part("nowhere", (10, 3), (range(10),)), "no tensor 'nowhere'"),
        (Part("fused", (10, 4), (range(10),)), r"'fused' has the shape \[10, 3\], config.json asks for \[10, 4\]"),
        (Part("ids", (3,), (range(3),)), "'ids' is of the type I64"),
    ],
)
def test_what_the_checkpoint_lacks_is_named_before_anything_is_read(directory: Path, part: Part, named: str) -> None:
    plan = {"bias": stacked(["bias"], [10], ()), "weight": (part,)}
    with pytest.raises(CheckpointError, match=named), capture_logs() as logs:
        read(Checkpoint(directory), plan)
    assert logs == []


def test_tensors_without_a_place_are_found_under_their_prefixes(directory: Path) -> None:
    plan = {"qkv": stacked(SIZES, SIZES.values(), (3,))}
    checkpoint = Checkpoint(directory)
    assert sorted(unclaimed(checkpoint, plan, ("fu", "q", "bi"))) == ["bias", "fused"]
    assert unclaimed(checkpoint, plan, ("q",)) == []
