"""Measures the vision tower on this CPU beside transformers' and beside the processor itself.

First `python -m benchmarks.checkpoints 1b DIR`, then `python -m benchmarks.tower --model DIR`. Every round times matrix
products, then our tower and transformers' with the same weights and tiles, in turns. Of the products the fastest counts
as what the processor can do; a tower's fraction of it is taken within the round, since a shared machine's speed drifts.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch.nn import functional

from shared.checkpoint import Checkpoint, read_config
from shared.packed_linear import PackedLinear, can_pack
from vision_service.model.loader import LoadedTower, load_tower
from vision_service.model.passes import pass_of
from vision_service.model.tower import TowerConfig, pixel_values
from vision_service.preprocess.image import Tiles

CPU: Final = torch.device("cpu")
# Rows, inputs and outputs of the products that stand for the processor; the last is the tower's own, for 4 tiles.
_PRODUCTS: Final = ((2048, 2048, 2048), (4100, 1024, 4096))
# As long as a tile takes: some processors are several times faster for a moment than they can be for a second.
_PRODUCT_S: Final = 1.0
Encode = Callable[[Tiles], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Samples:
    """Speeds of one thing, in GFLOP/s, one per round."""

    name: str
    tiles: int
    values: list[float] = field(default_factory=list)

    def tiles_per_s(self, gflop_per_tile: float) -> float:
        """Return the median in tiles per second."""
        return statistics.median(self.values) / gflop_per_tile

    def fractions(self, of: Sequence[float]) -> list[float]:
        """Return the parts of what was possible in the same rounds."""
        return [value / possible for value, possible in zip(self.values, of, strict=True)]


def gflop_per_tile(config: TowerConfig) -> float:
    """Return the arithmetic of a tile, in GFLOP: of matrix products and attention, a multiply and an add being two."""
    vit, tokens = config.vit, config.tokens_of_vit
    width, patch, merged = vit.hidden_size, vit.patch_size, vit.hidden_size * config.shuffle_factor**2
    matrices = vit.num_layers * width * (4 * width + 2 * vit.intermediate_size)
    attention = vit.num_layers * 2 * tokens * width
    patches = (tokens - 1) * width * 3 * patch**2
    projector = config.visual_tokens * config.hidden_size * (merged + config.hidden_size)
    return 2 * (tokens * (matrices + attention) + patches + projector) / 1e9


def ours(directory: Path, dtype: torch.dtype) -> tuple[LoadedTower, Encode]:
    """Return our tower and what runs it, as the service does."""
    loaded = load_tower(Checkpoint(directory), TowerConfig.of(read_config(directory)), CPU, dtype)
    one_pass = pass_of(loaded, max_tiles=16)
    return loaded, lambda tiles: one_pass.run([tiles])


def transformers(directory: Path, dtype: torch.dtype) -> Encode:
    """Return what runs transformers' tower, with the attention that it chooses by itself."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype).eval().requires_grad_(False).model
    del model.language_model
    gc.collect()

    @torch.inference_mode()
    def encode(tiles: Tiles) -> torch.Tensor:
        visual_tokens: torch.Tensor = model.get_image_features(
            pixel_values(torch.from_numpy(tiles), dtype), vision_feature_layer=-1
        ).pooler_output
        return visual_tokens

    return encode


def products(dtype: torch.dtype) -> list[Callable[[], float]]:
    """Return what times a product each and returns its GFLOP/s: plain, and packed where that can be had."""
    timed = []
    for rows, inputs, outputs in _PRODUCTS:
        left = torch.randn(rows, inputs).to(dtype)
        right = torch.randn(outputs, inputs).to(dtype)
        gflop = 2 * rows * inputs * outputs / 1e9
        timed.append(_timed(partial(functional.linear, left, right), gflop))
        if can_pack(CPU, dtype):
            packed = PackedLinear(None, rows, gelu=False)
            packed.hold(right)
            timed.append(_timed(partial(packed, left), gflop))
    return timed


def _timed(work: Callable[[], Any], gflop: float) -> Callable[[], float]:
    @torch.inference_mode()
    def run() -> float:
        count, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < _PRODUCT_S:
            work()
            count += 1
        return count * gflop / elapsed

    return run


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Have torch use so many threads; 0 leaves its choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def agreement(encoders: dict[str, Encode], config: TowerConfig) -> float:
    """Return the least cosine between the towers' visual tokens of a tile: that they do the same work."""
    tiles = np.random.default_rng(0).integers(0, 256, (1, config.image_size, config.image_size, 3), np.uint8)
    mine, theirs = (encode(tiles).float() for encode in encoders.values())
    return functional.cosine_similarity(mine, theirs, dim=-1).min().item()


def measure(
    encoders: dict[str, Encode], possible: Sequence[Callable[[], float]], config: TowerConfig, arguments: Any
) -> tuple[list[float], list[Samples]]:
    """Return the processor's speed of every round, and the towers'."""
    size, gflop = config.image_size, gflop_per_tile(config)
    peaks: list[float] = []
    samples = {(name, count): Samples(name, count) for count in arguments.tiles for name in encoders}
    for round_index in range(-1, arguments.rounds):
        peak = max(run() for run in possible)
        for count in arguments.tiles if round_index >= 0 else (1,):
            tiles = np.random.default_rng(count).integers(0, 256, (count, size, size, 3), np.uint8)
            order = list(encoders)[:: 1 if round_index % 2 else -1]
            for name in order:
                started = time.perf_counter()
                encoders[name](tiles)
                speed = count * gflop / (time.perf_counter() - started)
                if round_index >= 0:  # the first is a warm-up
                    samples[name, count].values.append(speed)
        if round_index >= 0:
            peaks.append(peak)
    return peaks, list(samples.values())


def report(peaks: Sequence[float], samples: Sequence[Samples], gflop: float) -> dict[str, Any]:
    """Print the table and return the same as data."""
    print(f"best matrix product: {_spread(peaks, 0)} GFLOP/s; a tile: {gflop:.1f} GFLOP\n")
    print(f"{'tower':<14}{'tiles':>6}{'s per tile':>12}{'tiles/s':>9}  {'GFLOP/s':<20}{'of the product':<22}")
    rows = []
    for sample in samples:
        speed = sample.tiles_per_s(gflop)
        fractions = sample.fractions(peaks)
        print(
            f"{sample.name:<14}{sample.tiles:>6}{1 / speed:>12.2f}{speed:>9.3f}  "
            f"{_spread(sample.values, 0):<20}{_spread(fractions, 2):<22}"
        )
        rows.append({"tower": sample.name, "tiles": sample.tiles, "gflop_per_s": sample.values, "fractions": fractions})
    gains = {}
    for count in sorted({sample.tiles for sample in samples}):
        mine, theirs = (sample.values for sample in samples if sample.tiles == count)
        gains[count] = [own / other for own, other in zip(mine, theirs, strict=True)]
        print(f"ours / transformers, {count} tiles: {_spread(gains[count], 2)}")
    return {"products_gflop_per_s": list(peaks), "gflop_per_tile": gflop, "towers": rows, "gains": gains}


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}-{max(values):.{digits}f}]"


def main() -> None:
    """Measure and print."""
    first, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=f"{first} {rest}")
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory, in the -hf layout")
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 4], help="tiles in a call")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    with threads(arguments.threads):
        loaded, encode = ours(arguments.model, dtype)
        encoders = {"ours": encode, "transformers": transformers(arguments.model, dtype)}
        config = loaded.tower.config
        print(f"least cosine of two visual tokens of the same patch: {agreement(encoders, config):.4f}")
        peaks, samples = measure(encoders, products(dtype), config, arguments)
        figures = report(peaks, samples, gflop_per_tile(config))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
