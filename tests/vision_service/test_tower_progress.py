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
from vision_service.runner import ModelRunner, _Courtesy

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


class RecordedSign(BusySign):
    """Notes how long it would have been waited for at most."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Side.VISION)
        self.waits: list[float] = []

    def wait_for_neighbour(self, most_s: float) -> None:
        self.waits.append(most_s)


async def test_every_block_lets_its_neighbour_go_first_and_the_tower_says_that_it_works(tmp_path: Path) -> None:
    sign, language = RecordedSign(tmp_path / "neighbour"), BusySign(tmp_path / "neighbour", Side.LANGUAGE)
    runner = ModelRunner(load_tiny, sign=sign)
    loaded = await runner.load()
    seen = []
    loaded.tower.register_forward_hook(lambda *_: seen.append(language.neighbour_is_busy()))
    await runner.encode([PICTURE])
    assert len(sign.waits) == len(loaded.tower.vision_model.encoder.layers)
    assert seen == [True]
    assert not language.neighbour_is_busy()
    runner.close()


def test_the_tower_waits_no_longer_than_it_has_worked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sign, moments = RecordedSign(tmp_path / "neighbour"), iter((0.0, 0.1, 5.0, 5.03, 9.0, 99.0, 99.0))
    monkeypatch.setattr("vision_service.runner.time.monotonic", lambda: next(moments))
    courtesy = _Courtesy(sign)
    for _ in range(3):
        courtesy()
    monkeypatch.undo()
    assert sign.waits == pytest.approx([0.1, 0.03, 0.25])
