"""Runs each replica of the vision tower on a thread of its own, and other work that blocks on a few more.

This is the file where asyncio ends: `await` on one side, plain synchronous code on the other.
"""

import asyncio
import contextvars
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Final, ParamSpec, TypeVar

import torch

from shared.busy_sign import BusySign
from shared.embedding import DataType
from shared.stall import Progress
from shared.tensors import data_type_of
from vision_service.model.loader import LoadedTower
from vision_service.model.passes import TowerPass, pass_of
from vision_service.preprocess.image import Tiles

P = ParamSpec("P")
T = TypeVar("T")


# How long a block of the tower waits at most: a step that reads a prompt may take longer.
_LONGEST_WAIT_S: Final = 0.25


class WorkerPool:
    """Runs blocking functions in threads of its own, so that the event loop never waits for them."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=name)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `function` returns. A caller that is cancelled leaves a running function to its end."""
        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: context.run(function, *args, **kwargs))

    def close(self) -> None:
        """Start nothing more; does not wait for what is running."""
        self._threads.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class TowerIdentity:
    """What, besides picture and tiling, decides an embedding's value."""

    fingerprint: str
    data_type: DataType


class ModelRunner:
    """Owns one replica of the vision tower and the one thread that touches it. `load` is called on that thread.

    `max_tiles` is how many tiles there are at most in a call of `encode`, as a rule. A tower on a CPU raises `sign`
    while it computes, and before each of its blocks waits for a neighbour that does.
    """

    def __init__(self, load: Callable[[], LoadedTower], max_tiles: int = 16, sign: BusySign | None = None) -> None:
        self._load = load
        self._sign = sign
        self._max_tiles = max_tiles
        self._thread = WorkerPool(1, "model")
        self._loaded: LoadedTower | None = None
        self._pass: TowerPass | None = None
        self._num_begun = self._num_ended = 0

    @property
    def loaded(self) -> LoadedTower:
        """The tower; it has to have been loaded."""
        assert self._loaded is not None
        return self._loaded

    @property
    def identity(self) -> TowerIdentity:
        """What the tower's embeddings are named after."""
        weight = next(self.loaded.tower.parameters())
        return TowerIdentity(self.loaded.fingerprint, data_type_of(weight))

    async def load(self) -> LoadedTower:
        """Load the tower; raises `CheckpointError`."""
        loaded, self._pass = await self._thread.run(self._load_pass)
        self._loaded = loaded
        return loaded

    async def encode(self, pictures: Sequence[Tiles]) -> list[torch.Tensor]:
        """Return the visual tokens [tokens, hidden] of every picture, on the CPU."""
        return await self._thread.run(self._encode, pictures)

    def progress(self) -> Progress:
        """Return how many batches have left the tower, and whether another is in it; from any thread."""
        return Progress(self._num_ended, self._num_begun > self._num_ended)

    def close(self) -> None:
        """Let the thread end after what it is doing."""
        self._thread.close()

    # Below: on the model thread.

    def _load_pass(self) -> tuple[LoadedTower, TowerPass]:
        loaded = self._load()
        if self._sign and loaded.device.type == "cpu":
            courtesy = _Courtesy(self._sign)
            for block in loaded.tower.vision_model.encoder.layers:
                block.register_forward_pre_hook(courtesy)
        return loaded, pass_of(loaded, self._max_tiles)

    def _encode(self, pictures: Sequence[Tiles]) -> list[torch.Tensor]:
        assert self._pass is not None
        self._num_begun += 1
        on_cpu = self.loaded.device.type == "cpu"
        try:
            with self._sign.raised() if self._sign and on_cpu else nullcontext():
                visual_tokens = self._pass.run(pictures)  # [tiles, tokens per tile, hidden]
        finally:
            self._num_ended += 1
        parts = torch.split(visual_tokens, [len(picture) for picture in pictures])
        return [part.flatten(0, 1) for part in parts]


class _Courtesy:
    """Lets the neighbour's step end before a block of the tower; for no longer than the tower itself has worked since.

    So the tower keeps half of the processors at least, however small it is and however busy the neighbour.
    """

    def __init__(self, sign: BusySign) -> None:
        self._sign = sign
        self._working_since = time.monotonic()

    def __call__(self, *_: object) -> None:
        worked_s = time.monotonic() - self._working_since
        self._sign.wait_for_neighbour(min(_LONGEST_WAIT_S, worked_s))
        self._working_since = time.monotonic()
