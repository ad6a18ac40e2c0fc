"""Runs the tower on a GPU as recorded CUDA graphs, one for each of a few numbers of tiles, between pinned buffers."""

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Final

import numpy as np
import structlog
import torch

from vision_service.model.loader import LoadedTower
from vision_service.preprocess.image import Tiles

log = structlog.get_logger()

# Does some work on fixed memory, again and again.
Work = Callable[[], None]
# Records work and returns what repeats it; raises `RuntimeError` where it cannot be recorded.
Record = Callable[[Work], Work]

_recording: Final = Lock()  # torch records one graph at a time, of whichever device


class GraphPass:
    """Runs a tower on a GPU. A pass is padded to the next power of two, and each such size is recorded when it comes.

    A graph starts a pass's hundreds of kernels at once. A size that cannot be recorded runs as it is. Tiles come and
    visual tokens leave through pinned memory, which the GPU copies without a detour.
    """

    def __init__(self, loaded: LoadedTower, max_tiles: int, record: Record | None = None) -> None:
        """Keep memory for `max_tiles`; more go one pass after the other. `record` is for tests without a GPU."""
        config = loaded.tower.config
        self._tower = loaded.tower
        self._max_tiles = max_tiles
        self._record = record or GraphRecorder(loaded.device)
        self._works: dict[int, Work] = {}
        pixels = (max_tiles, config.image_size, config.image_size, 3)
        tokens = (max_tiles, config.visual_tokens, config.hidden_size)
        self._tiles = _Staged(pixels, torch.uint8, loaded.device)
        self._visual_tokens = _Staged(tokens, loaded.dtype, loaded.device)

    @torch.inference_mode()
    def run(self, pictures: Sequence[Tiles]) -> torch.Tensor:
        """Return [tiles, tokens, hidden]."""
        tiles = [tile for picture in pictures for tile in picture]
        visual_tokens = self._visual_tokens.host.new_empty((len(tiles), *self._visual_tokens.host.shape[1:]))
        for start in range(0, len(tiles), self._max_tiles):
            part = tiles[start : start + self._max_tiles]
            visual_tokens[start : start + len(part)] = self._run(part)
        return visual_tokens

    def _run(self, tiles: Sequence[Tiles]) -> torch.Tensor:
        """Return the visual tokens in the pinned buffer, where they are until the next call."""
        count = len(tiles)
        np.stack(tiles, out=self._tiles.host[:count].numpy())
        self._tiles.device[:count].copy_(self._tiles.host[:count], non_blocking=True)
        self._work(bucket_of(count, self._max_tiles))()
        # Waits for the GPU; after it all buffers are free again.
        return self._visual_tokens.host[:count].copy_(self._visual_tokens.device[:count])

    def _work(self, bucket: int) -> Work:
        if bucket not in self._works:
            self._works[bucket] = self._recorded(bucket)
        return self._works[bucket]

    def _recorded(self, bucket: int) -> Work:
        tiles, visual_tokens = self._tiles.device[:bucket], self._visual_tokens.device[:bucket]

        def work() -> None:
            visual_tokens.copy_(self._tower(tiles))

        try:
            return self._record(work)
        except RuntimeError as error:  # too little memory is one of these
            log.warning("tower_graph_not_recorded", tiles=bucket, error=type(error).__name__)
            return work


def bucket_of(num_tiles: int, max_tiles: int) -> int:
    """Return how many tiles a pass of `num_tiles` is padded to: a power of two, or the most there are."""
    return min(1 << (num_tiles - 1).bit_length(), max_tiles)


class GraphRecorder:
    """Records CUDA graphs. They share the memory of what they compute on the way, so they must not run side by side."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """Run the work, record it, and return what repeats it."""
        graph = torch.cuda.CUDAGraph()
        with _recording, torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                work()  # what libraries set up at a first call cannot be recorded
                # Only this thread's calls count: others may use their GPUs meanwhile.
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    work()
            current.wait_stream(self._stream)
        return graph.replay


class _Staged:
    """Memory on a device and its pinned counterpart on the host."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.device = torch.zeros(shape, dtype=dtype, device=device)
        self.host = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
