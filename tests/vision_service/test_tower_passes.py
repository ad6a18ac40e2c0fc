"""Passes through the tower: in parts where memory asks for it, and on a GPU by graphs that are recorded once each."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch

from shared.checkpoint import Checkpoint, read_config
from tests.golden_cases import GOLDEN
from vision_service.model import passes
from vision_service.model.graphs import GraphPass, Work, bucket_of
from vision_service.model.loader import LoadedTower, load_tower
from vision_service.model.passes import CpuPass, pass_of
from vision_service.model.tower import TowerConfig
from vision_service.preprocess.image import Tiles

TINY = GOLDEN / "checkpoints/internvl3-8b-tiny"


@cache
def loaded() -> LoadedTower:
    return load_tower(Checkpoint(TINY), TowerConfig.of(read_config(TINY)), torch.device("cpu"), torch.float32)


def pictures(*counts: int, seed: int = 0) -> list[Tiles]:
    noise = np.random.default_rng(seed)
    return [noise.integers(0, 256, (count, 56, 56, 3), np.uint8) for count in counts]


@torch.inference_mode()
def expected_of(shown: Sequence[Tiles]) -> torch.Tensor:
    expected: torch.Tensor = loaded().tower(torch.from_numpy(np.concatenate(shown)))
    return expected


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0.0)


class Recorder:
    """Stands for recording, and counts; the first `refused` works cannot be recorded."""

    def __init__(self, refused: int = 0) -> None:
        self.recorded = 0
        self.replayed = 0
        self._refused = refused

    def __call__(self, work: Work) -> Work:
        if self._refused:
            self._refused -= 1
            raise RuntimeError("out of memory")
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


def test_a_tower_on_a_cpu_runs_without_graphs() -> None:
    assert isinstance(pass_of(loaded(), max_tiles=4), CpuPass)


def test_a_cpu_pass_in_parts_returns_what_one_pass_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = pictures(2, 1, 4)
    whole = CpuPass(loaded()).run(shown)
    assert_close(whole, expected_of(shown))
    monkeypatch.setattr(passes, "_LARGEST_ACTIVATION_BYTES", 1)  # one tile at a time
    assert_close(CpuPass(loaded()).run(shown), whole)


def test_passes_are_padded_to_powers_of_two_and_never_beyond_the_most() -> None:
    assert [bucket_of(count, 12) for count in (1, 2, 3, 4, 5, 8, 9, 12)] == [1, 2, 4, 4, 8, 8, 12, 12]


def test_every_size_is_recorded_once_and_repeated() -> None:
    record = Recorder()
    run = GraphPass(loaded(), 8, record).run
    for count in (3, 4, 1, 3):
        shown = pictures(count, seed=count)
        assert_close(run(shown), expected_of(shown))
    assert (record.recorded, record.replayed) == (2, 4)


def test_the_tiles_of_an_earlier_pass_leave_no_trace() -> None:
    run = GraphPass(loaded(), 8, Recorder()).run
    run(pictures(8, seed=1))
    shown = pictures(2, 3, seed=2)  # padded with tiles of the pass before
    assert_close(run(shown), expected_of(shown))


def test_results_are_not_overwritten_by_the_next_pass() -> None:
    run = GraphPass(loaded(), 4, Recorder()).run
    first, second = pictures(2, seed=1), pictures(2, seed=2)
    kept = run(first)
    run(second)
    assert_close(kept, expected_of(first))


def test_more_tiles_than_there_is_memory_for_go_one_pass_after_the_other() -> None:
    record = Recorder()
    shown = pictures(5, 6)
    assert_close(GraphPass(loaded(), 4, record).run(shown), expected_of(shown))
    assert (record.recorded, record.replayed) == (1, 3)


def test_a_size_that_cannot_be_recorded_runs_as_it_is() -> None:
    record = Recorder(refused=1)
    run = GraphPass(loaded(), 8, record).run
    for count in (4, 3, 2):
        shown = pictures(count)
        assert_close(run(shown), expected_of(shown))
    assert (record.recorded, record.replayed) == (1, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_recorded_graphs_return_what_the_gpu_returns_without_them(dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    on_gpu = load_tower(Checkpoint(TINY), TowerConfig.of(read_config(TINY)), device, dtype)
    run = pass_of(on_gpu, max_tiles=4).run
    for counts in ((1,), (2, 1), (4,), (3, 3), (1,)):
        shown = pictures(*counts, seed=sum(counts))
        with torch.inference_mode():
            expected = on_gpu.tower(torch.from_numpy(np.concatenate(shown)).to(device)).cpu()
        torch.testing.assert_close(run(shown), expected, atol=1e-4 if dtype == torch.float32 else 0.05, rtol=0.02)
