"""What a replica of the tower says of its progress: a stuck batch shows, a failed one does not."""

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.busy_sign import BusySign, Side
from shared.checkpoint import Checkpoint, read_config
from shared.stall import Progress
from tests.golden_cases import GOLDEN
from vision_service.model.loader import LoadedTower, load_tower
from vision_service.model.tower import TowerConfig
from vision_service.runner import ModelRunner

TINY = GOLDEN / "checkpoints" / "internvl3-8b-tiny"
PICTURE = np.zeros((1, 56, 56, 3), np.uint8)


def load_tiny() -> LoadedTower:
    return load_tower(Checkpoint(TINY), TowerConfig.of(read_config(TINY)), torch.device("cpu"), torch.float32)


async def test_a_batch_in_the_tower_is_work_until_it_has_left_it() -> None:
    gate, entered = threading.Event(), threading.Event()
    runner = ModelRunner(load_tiny)
    loaded = await runner.load()

    def wait(*_: object) -> None:
        entered.set()
        gate.wait()

    loaded.tower.register_forward_pre_hook(wait)
    assert runner.progress() == Progress(0, has_work=False)
    encoding = asyncio.create_task(runner.encode([PICTURE]))
    await asyncio.to_thread(entered.wait)
    assert runner.progress() == Progress(0, has_work=True)
    gate.set()
    await encoding
    assert runner.progress() == Progress(1, has_work=False)
    runner.close()


async def test_a_batch_that_failed_has_left_the_tower() -> None:
    runner = ModelRunner(load_tiny)
    await runner.load()
    with pytest.raises(RuntimeError):
        await runner.encode([np.zeros((1, 4, 4, 3), np.uint8)])  # smaller than a patch
    assert runner.progress() == Progress(1, has_work=False)
    runner.close()


async def test_the_tower_waits_for_a_step_of_its_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vision_service.runner._LONGEST_WAIT_S", 600.0)
    sign, language = (BusySign(tmp_path / "neighbour", side) for side in Side)
    runner = ModelRunner(load_tiny, sign=sign)
    await runner.load()
    with language.raised():
        encoding = asyncio.create_task(runner.encode([PICTURE]))
        while not language.neighbour_is_busy():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)  # as long as the tiny tower takes, many times over
        assert runner.progress() == Progress(0, has_work=True)
    await asyncio.wait_for(encoding, 20)
    assert not language.neighbour_is_busy()
    runner.close()
