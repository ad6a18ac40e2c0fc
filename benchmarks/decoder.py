"""Measures the language model on this CPU beside transformers' and beside the memory itself.

`python -m benchmarks.decoder --shape 1b`. The weights are random and made in memory, the same for both. Every round
reads memory as fast as it can be read, then runs steps that decode one token for each of several streams, ours and
transformers' (static cache, torch's attention) in turns, or reads a prompt: ours in chunks, transformers' at once. A
step has to read all weights once: how often it could have done so in its time is taken within the round, since a shared
machine's speed drifts.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.checkpoints import SHAPES
from llm_service.engine import sequence
from llm_service.engine.model_runner import ModelRunner
from llm_service.engine.scheduler import ScheduledTokens
from llm_service.model.attention import KVCache
from llm_service.model.config import DecoderConfig, decoder_config
from llm_service.model.decoder import Decoder
from llm_service.model.loader import pack_decoder, tensor_targets
from llm_service.prompt.splice import PromptTokens
from shared.allocator import keep_freed_memory

CPU: Final = torch.device("cpu")
_BLOCK_SIZE: Final = 16
_READ_BYTES: Final = 1 << 29
_STEPS: Final = 5  # of each kind in a round, of which the median counts


@dataclass(frozen=True, slots=True)
class Work:
    """What is timed: `streams` that know `length` tokens each get one more, or a prompt of that length is read."""

    length: int
    streams: int = 0

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"decode {self.streams} x {self.length}" if self.streams else f"prefill {self.length}"


class Contender:
    """A way to run a model."""

    def prepare(self, work: Work) -> Callable[[], object]:
        """Return what does the work once; it can be called again and again."""
        raise NotImplementedError


class Ours(Contender):
    """The service's runner over the service's decoder."""

    def __init__(self, decoder: Decoder, chunk: int, most_tokens: int) -> None:
        self._chunk = chunk
        self._cache = KVCache(decoder.config, -(-most_tokens // _BLOCK_SIZE), _BLOCK_SIZE, decoder.dtype, CPU)
        for layer in range(decoder.config.num_layers):
            self._cache.layer(layer).rows.normal_()
        self._runner = ModelRunner(decoder, self._cache)

    def prepare(self, work: Work) -> Callable[[], object]:
        """Return a step, or as many as there are chunks."""
        if work.streams:
            seqs = [_sequence(work.length, index) for index in range(work.streams)]
            for seq in seqs:
                seq.num_computed = work.length - 1
            return lambda: self._runner.step([ScheduledTokens(seq, 1) for seq in seqs])
        prompt = _sequence(work.length, 0)

        def read() -> None:
            for start in range(0, work.length, self._chunk):
                prompt.num_computed = start
                self._runner.step([ScheduledTokens(prompt, min(self._chunk, work.length - start))])

        return read


def _sequence(length: int, index: int) -> sequence.Sequence:
    """Return a sequence of so many tokens, the index-th in the cache."""
    params = sequence.SamplingParams(max_output_tokens=1 << 20)
    seq = sequence.Sequence(
        sequence.EngineRequest(PromptTokens(tuple(range(length))), (), params), lambda output: None, 0
    )
    count = -(-length // _BLOCK_SIZE)
    seq.block_table = list(range(index * count, (index + 1) * count))
    return seq


class Transformers(Contender):
    """The library's model."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def prepare(self, work: Work) -> Callable[[], object]:
        """Return a step, or the reading of a prompt at once."""
        cache = self._cache(work.streams, work.length) if work.streams else None
        ids = torch.full((work.streams, 1), 7) if work.streams else torch.arange(work.length)[None]

        @torch.inference_mode()
        def run() -> None:
            for layer in cache.layers if cache else ():
                layer.cumulative_length.fill_(work.length - 1)
            logits = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            logits[:, -1].float().argmax(dim=-1).tolist()

        return run

    @torch.inference_mode()
    def _cache(self, rows: int, length: int) -> Any:
        from transformers import StaticCache

        config = self._model.config
        cache = StaticCache(config=config, max_cache_len=length)
        head_dim = config.hidden_size // config.num_attention_heads
        for layer in range(config.num_hidden_layers):
            states = torch.randn(rows, config.num_key_value_heads, length, head_dim).to(self._model.dtype)
            cache.update(states, states, layer)
        return cache


@dataclass(frozen=True, slots=True)
class Samples:
    """Seconds of one piece of work, by contender, and the bandwidth in the same rounds, in bytes per second."""

    work: Work
    seconds: dict[str, list[float]] = field(default_factory=dict)
    bandwidths: list[float] = field(default_factory=list)

    def times_bound(self, weight_bytes: int) -> list[float]:
        """Return how many times the weights could have been read in the time of one of our steps."""
        own = self.seconds["ours"]
        return [own_s * speed / weight_bytes for own_s, speed in zip(own, self.bandwidths, strict=True)]


def models(config: DecoderConfig, shape: dict[str, Any], dtype: torch.dtype) -> tuple[Decoder, Any]:
    """Return our decoder, packed where it would be by the service, and the library's with the same random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        library = Qwen2ForCausalLM(Qwen2Config(**shape, attn_implementation="sdpa")).eval().requires_grad_(False)
        own = Decoder(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    theirs = dict(library.named_parameters())
    for name, target in tensor_targets(own).items():
        target.copy_(theirs[name.removeprefix("language_model.")])
    pack_decoder(own)
    return own, library


def agreement(config: DecoderConfig, decoder: Decoder, library: Any) -> float:
    """Return the cosine between the models' logits after a prompt: that they do the same work."""
    prompt = _sequence(40, 0)
    cache = KVCache(config, 8, _BLOCK_SIZE, decoder.dtype, CPU)
    mine = ModelRunner(decoder, cache).prompt_logits([ScheduledTokens(prompt, 40)])[-1]
    with torch.inference_mode():
        theirs = library(torch.arange(40)[None]).logits[0, -1].float()
    return torch.cosine_similarity(mine, theirs, dim=0).item()


def read_speed(buffer: torch.Tensor) -> float:
    """Return how many bytes a second a sum over a large buffer reads."""
    started = time.perf_counter()
    buffer.sum()
    return buffer.nbytes / (time.perf_counter() - started)


def measure(
    contenders: dict[str, Contender], works: Sequence[Work], rounds: int, buffer: torch.Tensor
) -> list[Samples]:
    """Time everything in turns; the first round is a warm-up."""
    all_samples = [Samples(work, {name: [] for name in contenders}) for work in works]
    for samples in all_samples:
        steps = _STEPS if samples.work.streams else 1
        runs = {name: contender.prepare(samples.work) for name, contender in contenders.items()}
        for round_index in range(-1, rounds):
            speeds = [read_speed(buffer)]
            for name in list(runs)[:: 1 if round_index % 2 else -1]:
                seconds = _median_seconds(runs[name], steps)
                if round_index >= 0:
                    samples.seconds[name].append(seconds)
                speeds.append(read_speed(buffer))
            if round_index >= 0:
                samples.bandwidths.append(max(speeds))
    return all_samples


def _median_seconds(run: Callable[[], object], count: int) -> float:
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def report(all_samples: Sequence[Samples], weight_bytes: int) -> dict[str, Any]:
    """Print the table and return the same as data."""
    speeds = [speed / 1e9 for samples in all_samples for speed in samples.bandwidths]
    print(f"weights of a step: {weight_bytes / 1e6:.0f} MB; memory is read at {_spread(speeds, 1)} GB/s\n")
    print(f"{'work':<18}{'ours, ms':<22}{'tokens/s':>9}  {'times the bound':<20}{'transformers, ms':<24}{'gain':<18}")
    rows = []
    for samples in all_samples:
        own, other = samples.seconds["ours"], samples.seconds.get("transformers", [])
        bound = samples.times_bound(weight_bytes) if samples.work.streams else []
        tokens = (samples.work.streams or samples.work.length) / statistics.median(own)
        gains = [theirs / mine for theirs, mine in zip(other, own, strict=False)]
        print(
            f"{samples.work.name:<18}{_spread([s * 1e3 for s in own], 1):<22}{tokens:>9.0f}  {_spread(bound, 2):<20}"
            f"{_spread([s * 1e3 for s in other], 1):<24}{_spread(gains, 2):<18}"
        )
        rows.append(
            {
                "work": samples.work.name,
                "seconds": samples.seconds,
                "bytes_per_s": samples.bandwidths,
                "times_bound": bound,
                "gains": gains,
            }
        )
    return {"weight_bytes": weight_bytes, "rows": rows}


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}-{max(values):.{digits}f}]"


def shape_of(name: str) -> dict[str, Any]:
    """Return a checkpoint's language model, as its config.json describes it."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": SHAPES[name].vocabulary,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "tie_word_embeddings": False,
        **SHAPES[name].language,
    }


def main() -> None:
    """Measure and print."""
    first, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=f"{first} {rest}")
    parser.add_argument("--shape", choices=list(SHAPES), default="1b")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16], help="sequences that decode together")
    parser.add_argument("--lengths", type=int, nargs="+", default=[300], help="tokens that each of them knows")
    parser.add_argument("--prompt", type=int, default=3300, help="tokens of the prompt; 0: none is read")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a prompt in one of our steps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    keep_freed_memory()  # as the service does
    shape = shape_of(arguments.shape)
    config = decoder_config(shape)
    decoder, library = models(config, shape, getattr(torch, arguments.dtype))
    works = [Work(length, streams) for length in arguments.lengths for streams in arguments.streams]
    works += [Work(arguments.prompt)] if arguments.prompt else []
    most_tokens = max((work.streams or 1) * (work.length + _BLOCK_SIZE) for work in works)
    ours = Ours(decoder, arguments.chunk, most_tokens)
    print(f"cosine of the logits after a prompt: {agreement(config, decoder, library):.4f}")
    contenders: dict[str, Contender] = {"ours": ours}
    if not arguments.alone:
        contenders["transformers"] = Transformers(library)
    buffer = torch.ones(_READ_BYTES // 4)
    samples = measure(contenders, works, arguments.rounds, buffer)
    figures = report(samples, decoder.weight_bytes - decoder.embed.weight.nbytes)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
