"""Measures what a step that decodes costs beside its arithmetic: scheduling, building tensors, sampling, Python.

`python -m benchmarks.step_overhead`. The real engine decodes for streams that never end, step by step in this thread
and without an event loop. What is not spent inside the native kernels is the overhead. Needs these kernels. The weights
are random. The default shape is the small one, whose steps are short.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from benchmarks.checkpoints import SHAPES
from benchmarks.decoder import CPU, models, shape_of
from benchmarks.table import text_of_all
from llm_service.engine.block_manager import BlockManager
from llm_service.engine.engine import EngineLimits, PagedEngine
from llm_service.engine.model_runner import ModelRunner
from llm_service.engine.pace import StepLimits
from llm_service.engine.sequence import EngineRequest, SamplingParams, candidates_of
from llm_service.model.attention import KVCache
from llm_service.model.config import decoder_config
from llm_service.model.decoder import Decoder
from llm_service.prompt.splice import PromptTokens
from shared.allocator import keep_freed_memory
from shared.few_rows import FewRowsMatrix
from shared.native.library import Function, kernels

_BLOCK_SIZE: Final = 16


class _ClosedLoop:
    """Takes the place of an event loop: whatever is delivered is dropped."""

    def is_closed(self) -> bool:
        return True


class Streams:
    """An engine of which this thread computes the steps, with so many streams that decode."""

    def __init__(self, decoder: Decoder, count: int, length: int, most_steps: int) -> None:
        config = decoder.config
        most_steps += 4 * count  # prompts are not all read in one step
        blocks = count * -(-(length + most_steps) // _BLOCK_SIZE)
        cache = KVCache(config, blocks, _BLOCK_SIZE, decoder.dtype, CPU)
        for layer in range(config.num_layers):
            cache.layer(layer).rows.normal_()
        limits = EngineLimits(count, StepLimits(max(2048, count)), length + most_steps)
        self._engine = PagedEngine(ModelRunner(decoder, cache), BlockManager(blocks, _BLOCK_SIZE), limits)
        self._engine._loop = _ClosedLoop()  # type: ignore[assignment]
        params = SamplingParams(max_output_tokens=1 << 20)
        reading = []
        for index in range(count):
            prompt = PromptTokens(tuple(range(index, index + length)))
            (seq,) = candidates_of(EngineRequest(prompt, (), params), lambda output: None, time.monotonic(), "")
            self._engine._add(seq)
            reading.append(seq)
        while any(seq.num_output < 2 for seq in reading):
            self.step()

    def step(self) -> None:
        """Schedule, compute and deliver, as the engine's own thread does."""
        batch = self._engine._scheduler.next_batch()
        self._engine._deliver(self._engine._compute(batch))


class KernelClock:
    """Adds up the time inside the native kernels of a decoder that has computed a step."""

    def __init__(self, decoder: Decoder) -> None:
        self.seconds = 0.0
        native = kernels()
        assert native is not None
        assert decoder._native is not None
        assert decoder._native[1] is not None
        decoder._native[1]._native = replace(native, decode_layers=self._timed(native.decode_layers))
        timed = self._timed(native.few_rows_linear)
        for module in decoder.modules():
            if isinstance(matrix := getattr(module, "_few_rows", None), FewRowsMatrix):
                matrix._kernel = timed

    def _timed(self, kernel: Function) -> Function:
        def call(*arguments: object) -> None:
            began = time.perf_counter()
            kernel(*arguments)
            self.seconds += time.perf_counter() - began

        return call


def measured(streams: Streams, clock: KernelClock, count: int) -> tuple[float, float]:
    """Return what a step takes, and what of it is outside the kernels: medians of so many, in milliseconds."""
    whole, outside = [], []
    for _ in range(count):
        clock.seconds, began = 0.0, time.perf_counter()
        streams.step()
        whole.append(1e3 * (time.perf_counter() - began))
        outside.append(whole[-1] - 1e3 * clock.seconds)
    return statistics.median(whole), statistics.median(outside)


def main() -> None:
    """Measure and print."""
    first, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=f"{first} {rest}")
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 32])
    parser.add_argument("--length", type=int, default=100, help="tokens of each stream's prompt")
    parser.add_argument("--steps", type=int, default=40, help="of a round, of which the median counts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    if kernels() is None:
        parser.error("there are no native kernels here: python -m shared.native.build says why")
    keep_freed_memory()  # as the service does
    shape = shape_of(arguments.shape)
    decoder, library = models(decoder_config(shape), shape, torch.bfloat16)
    del library
    rows = []
    print(f"{'streams':<9}{'step, ms':<22}{'outside the kernels, ms':<24}")
    for count in arguments.streams:
        streams = Streams(decoder, count, arguments.length, arguments.rounds * arguments.steps + 2)
        clock = KernelClock(decoder)
        found = [measured(streams, clock, arguments.steps) for _ in range(arguments.rounds)]
        whole, outside = [pair[0] for pair in found], [pair[1] for pair in found]
        print(f"{count:<9}{text_of_all(whole):<22}{text_of_all(outside):<24}", flush=True)
        rows.append({"streams": count, "step_ms": whole, "outside_kernels_ms": outside})
    if arguments.json:
        arguments.json.write_text(json.dumps({"shape": arguments.shape, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
