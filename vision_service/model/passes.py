"""A pass of pictures through the tower: on a CPU a few tiles at a time, on a GPU all at once, as a recorded graph."""

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
import torch

from vision_service.model.graphs import GraphPass
from vision_service.model.loader import LoadedTower
from vision_service.preprocess.image import Tiles

# The largest block that glibc takes back into its heap. What is larger is unmapped when it is freed, and its pages are
# faulted in again in every layer: a tenth of the time.
_LARGEST_ACTIVATION_BYTES: Final = 32 << 20


class TowerPass(Protocol):
    """Runs the tower. For one thread only, the one that loaded it."""

    def run(self, pictures: Sequence[Tiles]) -> torch.Tensor:
        """Return the visual tokens [tiles, tokens, hidden] of all pictures' tiles, in new memory of the CPU."""


class CpuPass:
    """Runs a tower on the CPU: one tile keeps all cores busy, and two are somewhat better than one."""

    def __init__(self, loaded: LoadedTower) -> None:
        self._tower = loaded.tower
        config = loaded.tower.config
        widest_bytes = config.tokens_of_vit * config.vit.intermediate_size * loaded.dtype.itemsize
        self._most_tiles = max(1, _LARGEST_ACTIVATION_BYTES // widest_bytes)

    @torch.inference_mode()
    def run(self, pictures: Sequence[Tiles]) -> torch.Tensor:
        """Return [tiles, tokens, hidden]."""
        tiles = torch.from_numpy(np.concatenate(pictures))
        parts = [self._tower(part) for part in tiles.tensor_split(-(-len(tiles) // self._most_tiles))]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def pass_of(loaded: LoadedTower, max_tiles: int) -> TowerPass:
    """Return what runs a tower where it is. `max_tiles` are the most in a pass for which a GPU keeps memory."""
    return GraphPass(loaded, max_tiles) if loaded.device.type == "cuda" else CpuPass(loaded)
