"""Hand-written stand-ins for the parts of the LLM service."""

import math
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from llm_service.engine import sequence
from llm_service.engine.block_manager import BlockManager
from llm_service.engine.engine import EngineLimits, PagedEngine
from llm_service.engine.model_runner import SampledToken
from llm_service.engine.pace import StepLimits
from llm_service.engine.scheduler import ScheduledTokens
from llm_service.engine.sequence import EngineRequest, SamplingParams
from llm_service.prompt.dialogue import EmbeddingRef
from llm_service.prompt.splice import PromptTokens
from shared.busy_sign import BusySign

VOCABULARY = 1000
LIMITS = EngineLimits(max_sequences=8, step=StepLimits(32), max_tokens=200)


def next_token(token_ids: Sequence[int]) -> int:
    """The fake model: what follows depends on every token before it."""
    return (sum((index + 1) * token for index, token in enumerate(token_ids)) + 7) % VOCABULARY


def continuation(prompt: Sequence[int], count: int, candidate: int = 0) -> list[int]:
    """What the fake model says after a prompt; each candidate says something else."""
    token_ids = list(prompt)
    for _ in range(count):
        token_ids.append((next_token(token_ids) + 17 * candidate) % VOCABULARY)
    return token_ids[len(prompt) :]


class FakeRunner:
    """A model without weights, whose cache holds the tokens themselves: a block is what it was written with.

    Where a token stands for a row of an embedding it is the row's one number.

    `poison` fails a batch that holds a sequence whose prompt begins with that token. Logits are no numbers where a
    prompt begins with `nan`, and for the token behind so many output tokens of a candidate (`nan_candidate`, count).
    Records every batch as (tokens of each sequence); a closed `gate` stops it before a step.
    """

    def __init__(
        self,
        block_size: int = 4,
        poison: int | None = None,
        nan: int | None = None,
        nan_candidate: tuple[int, int] | None = None,
    ) -> None:
        self.block_size, self.poison, self.nan, self.nan_candidate = block_size, poison, nan, nan_candidate
        self.cache: dict[tuple[int, int], int] = {}
        self.copies: list[tuple[int, int]] = []
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.on_step: Callable[[], None] = lambda: None

    def step(self, batch: list[ScheduledTokens]) -> list[SampledToken]:
        self.gate.wait(timeout=30)
        self.on_step()
        self.batches.append([tokens.count for tokens in batch])
        if any(tokens.seq.token_ids[0] == self.poison for tokens in batch):
            raise RuntimeError("a bad sequence")
        for tokens in batch:
            self._write(tokens)
        return [self._sampled(tokens, seq) for tokens in batch for seq in tokens.sampled]

    def copy_block(self, source: int, target: int) -> None:
        self.copies.append((source, target))
        for place in range(self.block_size):
            self.cache[target, place] = self.cache.get((source, place), -1)

    def _write(self, tokens: ScheduledTokens) -> None:
        seq = tokens.seq
        for index in range(seq.num_computed, seq.num_computed + tokens.count):
            self.cache[seq.block_table[index // self.block_size], index % self.block_size] = _token_at(seq, index)
        if probe := seq.request.probe:
            known = self._read(seq, seq.num_computed + tokens.count)
            for position in probe.positions:
                if seq.num_computed <= position < len(known):
                    number = math.nan if seq.token_ids[0] == self.nan else float(next_token(known[: position + 1]))
                    seq.probed[position] = (number,)

    def _read(self, seq: sequence.Sequence, length: int) -> list[int]:
        return [
            self.cache[seq.block_table[index // self.block_size], index % self.block_size] for index in range(length)
        ]

    def _sampled(self, tokens: ScheduledTokens, seq: sequence.Sequence) -> SampledToken:
        if seq.token_ids[0] == self.nan or (seq.candidate, seq.num_output) == self.nan_candidate:
            return SampledToken(None)
        known = self._read(tokens.seq, tokens.seq.num_computed + tokens.count)
        return SampledToken((next_token(known) + 17 * seq.candidate) % VOCABULARY)


def _token_at(seq: sequence.Sequence, index: int) -> int:
    for place, embedding in zip(seq.request.prompt.placeholders, seq.embeddings, strict=True):
        if place.start <= index < place.start + place.length:
            assert embedding is not None, "computed without its embedding"
            return int(embedding[index - place.start])
    return seq.token_ids[index]


def request(
    prompt: Sequence[int], max_output_tokens: int = 8, num_candidates: int = 1, **params: object
) -> EngineRequest:
    sampling = SamplingParams(max_output_tokens=max_output_tokens, **params)  # type: ignore[arg-type]
    return EngineRequest(PromptTokens(tuple(prompt)), (), sampling, num_candidates=num_candidates)


def ref(digest: str = "ab" * 32, tiles: int = 1, tokens_per_tile: int = 4, hidden: int = 64) -> EmbeddingRef:
    return EmbeddingRef(digest, tiles, tiles * tokens_per_tile, hidden, "float32", "127.0.0.1:1")


@asynccontextmanager
async def running(
    runner: FakeRunner, num_blocks: int = 64, limits: EngineLimits = LIMITS, neighbour: BusySign | None = None
) -> AsyncIterator[PagedEngine]:
    """An engine over a fake model; every block has to be free again at the end."""
    engine = PagedEngine(runner, BlockManager(num_blocks, runner.block_size), limits, neighbour=neighbour)
    engine.start()
    try:
        yield engine
    finally:
        runner.gate.set()
        engine.stop()
    assert engine.stats().num_free_blocks == num_blocks, "every block came back"
