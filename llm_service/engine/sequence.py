"""One prompt and its output inside the engine, and what the engine is asked and answers."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import torch

from llm_service.prompt.splice import PromptTokens


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen; see `GenerationConfig` in the protos for the meaning and range of each."""

    max_output_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    top_logprobs: int = 0

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A prompt with its embeddings, one tensor [length, hidden] per placeholder, in the model's dtype, on the CPU.

    `generated` are output tokens that are already known: decoding goes on behind them.
    """

    prompt: PromptTokens
    embeddings: tuple[torch.Tensor, ...]
    params: SamplingParams
    generated: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One generated token. `finish_reason` is set on the last; `queue_s` and `prefill_s` on the first."""

    token_id: int
    finish_reason: FinishReason | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    queue_s: float | None = None
    prefill_s: float | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """The engine's own state of a request. Belongs to the model thread, but for `deliver`, which is thread-safe.

    The first `num_computed` of `token_ids` have their keys and values in the cache, in the blocks of `block_table`.
    """

    request: EngineRequest
    deliver: Callable[[TokenOutput | Exception], None]
    arrival_time: float
    request_id: str = ""
    token_ids: list[int] = field(init=False)
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    seed: int = field(init=False)
    generator: torch.Generator | None = None
    start_time: float | None = None
    first_token_time: float | None = None

    def __post_init__(self) -> None:
        self.token_ids = [*self.request.prompt.ids, *self.request.generated]
        seed = self.request.params.seed
        self.seed = secrets.randbits(64) if seed is None else seed

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return len(self.token_ids) - self.num_computed

    @property
    def output_ids(self) -> list[int]:
        """The generated tokens."""
        return self.token_ids[len(self.request.prompt.ids) :]

    @property
    def is_decoding(self) -> bool:
        """Whether one token is all that a step has to compute."""
        return self.num_pending == 1 and self.num_computed > 0

    def finish_reason(self) -> FinishReason | None:
        """Return why the sequence ends with its last token, if it does."""
        params = self.request.params
        if self.token_ids[-1] in params.stop_token_ids:
            return FinishReason.STOP
        if len(self.output_ids) - len(self.request.generated) >= params.max_output_tokens:
            return FinishReason.LENGTH
        return None
