"""Hand-written stand-ins for the parts of the LLM service."""

import threading
from collections.abc import Callable, Sequence

from llm_service.engine.model_runner import SampledToken
from llm_service.engine.scheduler import ScheduledTokens
from llm_service.engine.sequence import EngineRequest, SamplingParams
from llm_service.prompt.dialogue import EmbeddingRef
from llm_service.prompt.splice import PromptTokens

VOCABULARY = 1000


def next_token(token_ids: Sequence[int]) -> int:
    """The fake model: what follows depends on every token before it."""
    return (sum((index + 1) * token for index, token in enumerate(token_ids)) + 7) % VOCABULARY


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    """What the fake model says after a prompt."""
    token_ids = list(prompt)
    for _ in range(count):
        token_ids.append(next_token(token_ids))
    return token_ids[len(prompt) :]


class FakeRunner:
    """A model without weights. `poison` fails a batch that holds a sequence whose prompt begins with that token.

    Records every batch as (tokens of each sequence); a closed `gate` stops it before a step.
    """

    def __init__(self, poison: int | None = None, nan: int | None = None) -> None:
        self.poison, self.nan = poison, nan
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
        return [self._sampled(tokens) for tokens in batch if tokens.completes]

    def _sampled(self, tokens: ScheduledTokens) -> SampledToken:
        seq = tokens.seq
        if seq.token_ids[0] == self.nan:
            return SampledToken(None, ())
        return SampledToken(next_token(seq.token_ids), ())


def request(prompt: Sequence[int], max_output_tokens: int = 8, **params: object) -> EngineRequest:
    sampling = SamplingParams(max_output_tokens=max_output_tokens, **params)  # type: ignore[arg-type]
    return EngineRequest(PromptTokens(tuple(prompt)), (), sampling)


def ref(digest: str = "ab" * 32, tiles: int = 1, tokens_per_tile: int = 4, hidden: int = 64) -> EmbeddingRef:
    return EmbeddingRef(digest, tiles, tiles * tokens_per_tile, hidden, "float32", "127.0.0.1:1")
