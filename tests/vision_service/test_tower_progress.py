"""What a replica of the tower says of its progress: a stuck batch shows, a failed one does not."""

import asyncio
import threading

import numpy as np
import pytest
import torch

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
