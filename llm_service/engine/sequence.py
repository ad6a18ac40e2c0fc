"""One prompt and its output inside the engine, and what the engine is asked and answers."""

import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Protocol

import torch

from llm_service.prompt.splice import PromptTokens

_MASK = (1 << 64) - 1


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"  # never the engine's: whoever reads the text sees the calls


class Priority(IntEnum):
    """Whose turn it is where not everybody's can be: the lower number's."""

    INTERACTIVE = 0  # somebody waits for every token
    BACKGROUND = 1


# Brings the embeddings of placeholders, given by index, one tensor [length, hidden] each.
Fetch = Callable[[tuple[int, ...]], Awaitable[Mapping[int, torch.Tensor]]]


class Constraint(Protocol):
    """What an answer may say, followed token by token. One sequence's own; model thread only."""

    def copy(self) -> "Constraint":
        """Return another that stands where this one stands."""

    def allowed(self) -> torch.Tensor:
        """Return which tokens may come next, bool [vocabulary] on the CPU. Repeatable; raises a `ServiceError`."""

    def accept(self, token_id: int) -> None:
        """Move past a token that was allowed."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen; see `GenerationConfig` in the protos for the meaning and range of each.

    `top_logprobs` None computes no log-probabilities; a number, zero included, tells the chosen token's as well.
    """

    max_output_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    top_logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def takes_likeliest(self) -> bool:
        """Whether the token of the largest logit is always taken, whatever was said before."""
        return self.is_greedy and self.repetition_penalty == 1.0


@dataclass(frozen=True, slots=True)
class Probe:
    """Asks how likely `token_ids` are, among themselves, after the prompt's tokens at `positions` (ascending)."""

    positions: tuple[int, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A prompt with its embeddings, one tensor [length, hidden] per placeholder, in the model's dtype, on the CPU.

    Instead of `embeddings` there may be `fetch`: it is awaited on the event loop for those that the KV cache lacks,
    rarely more than once, and not before the last tensors it brought are needed no more. `generated` are output tokens
    that are already known: decoding goes on behind them. `num_candidates` answers come of one reading of the prompt.
    `positions`, float32 [prompt tokens] on the CPU, are where the prompt's tokens stand for the rotary embedding, which
    is then never stretched; None: 0, 1, 2 and so on. `deadline`, of the monotonic clock, is when nobody waits for the
    first token any more. What is computed for a `tenant` is found by its own requests only; empty: by all of that kind.
    """

    prompt: PromptTokens
    embeddings: tuple[torch.Tensor, ...]
    params: SamplingParams
    generated: tuple[int, ...] = ()
    num_candidates: int = 1
    constraint: Constraint | None = None
    positions: torch.Tensor | None = None
    probe: Probe | None = None
    fetch: Fetch | None = None
    priority: Priority = Priority.INTERACTIVE
    deadline: float | None = None
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One generated token. `finish_reason` is set on a candidate's last; `queue_s` and `prefill_s` on its first.

    So is `num_cached`: how many of the prompt's tokens were in the KV cache when the engine began to read it.

    `logprob` and `top_logprobs`, likeliest first, are natural logarithms of the model's own probabilities: before
    penalty, constraint, temperature and truncation. None and empty where they were not asked for.
    """

    token_id: int
    finish_reason: FinishReason | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    queue_s: float | None = None
    prefill_s: float | None = None
    logprob: float | None = None
    candidate: int = 0
    num_cached: int | None = None


@dataclass(frozen=True, slots=True)
class ProbeOutput:
    """What a probe found: at each of its positions, the probabilities of its tokens among themselves."""

    probabilities: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """A candidate came to nothing."""

    error: Exception
    candidate: int = 0


@dataclass(frozen=True, slots=True)
class Wanted:
    """A sequence cannot go on before it gets the embeddings of these placeholders."""

    seq: "Sequence"
    placeholders: tuple[int, ...]


Output = TokenOutput | ProbeOutput | Failure | Wanted


@dataclass(slots=True, eq=False)
class Sequence:
    """The engine's own state of a request's candidate. Belongs to the model thread, but for `deliver`.

    The first `num_prompt` of `token_ids` are the prompt. The first `num_computed` have their keys and values in the
    cache, in the blocks of `block_table`; `num_cached` of those were there before it came. `block_keys` name what is in
    full blocks, as far as anybody asked. `embeddings` are those of the placeholders, None where they are not at hand;
    while it waits for some it `is_fetching`. `forks` are the other candidates, for as long as they wait for this one to
    read the prompt; `family` are all candidates, this one included.
    """

    request: EngineRequest
    deliver: Callable[[Output], None]
    arrival_time: float
    request_id: str = ""
    candidate: int = 0
    token_ids: list[int] = field(init=False)
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    num_cached: int | None = None
    embeddings: list[torch.Tensor | None] = field(init=False)
    is_fetching: bool = False
    num_prompt: int = field(init=False)
    seed: int = field(init=False)
    constraint: Constraint | None = field(init=False)
    forks: list["Sequence"] = field(default_factory=list)
    family: tuple["Sequence", ...] = ()
    probed: dict[int, tuple[float, ...]] = field(default_factory=dict)
    generator: torch.Generator | None = None
    start_time: float | None = None
    first_token_time: float | None = None

    def __post_init__(self) -> None:
        self.token_ids = [*self.request.prompt.ids, *self.request.generated]
        self.num_prompt = len(self.request.prompt.ids)
        self.drop_embeddings()
        seed = self.request.params.seed
        self.seed = _candidate_seed(secrets.randbits(64) if seed is None else seed, self.candidate)
        self.constraint = self.request.constraint.copy() if self.request.constraint else None

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_output(self) -> int:
        """Generated tokens."""
        return len(self.token_ids) - self.num_prompt

    @property
    def output_ids(self) -> list[int]:
        """The generated tokens."""
        return self.token_ids[self.num_prompt :]

    @property
    def is_decoding(self) -> bool:
        """Whether one token is all that a step has to compute."""
        return self.num_pending == 1 and self.num_computed > 0

    @property
    def is_answering(self) -> bool:
        """Whether that one token is the answer's latest, and not the rest of a prompt."""
        return self.is_decoding and self.first_token_time is not None

    @property
    def num_reusable(self) -> int:
        """The most tokens that may be taken from the cache: what has to be computed for an answer is the rest."""
        probe = self.request.probe
        return min(probe.positions) if probe else len(self.token_ids) - 1

    def lacks(self, num_computed: int) -> tuple[int, ...]:
        """Return the placeholders whose embeddings would have to be fetched if so many tokens were in the cache."""
        places = zip(self.request.prompt.placeholders, self.embeddings, strict=True)
        return tuple(
            index
            for index, (place, embedding) in enumerate(places)
            if embedding is None and place.start + place.length > num_computed
        )

    def drop_embeddings(self) -> None:
        """Let go of what was fetched."""
        given = self.request.embeddings
        self.embeddings = [None] * len(self.request.prompt.placeholders) if self.request.fetch else list(given)

    def finish_reason(self) -> FinishReason | None:
        """Return why the sequence ends with its last token, if it does."""
        params = self.request.params
        if self.token_ids[-1] in params.stop_token_ids:
            return FinishReason.STOP
        if self.num_output - len(self.request.generated) >= params.max_output_tokens:
            return FinishReason.LENGTH
        return None


def candidates_of(
    request: EngineRequest, deliver: Callable[[Output], None], arrival_time: float, request_id: str = ""
) -> tuple[Sequence, ...]:
    """Return a request's sequences; the first reads the prompt, and the others wait in its `forks`."""
    family = tuple(
        Sequence(request, deliver, arrival_time, request_id, candidate) for candidate in range(request.num_candidates)
    )
    for seq in family:
        seq.family = family
    family[0].forks = list(family[1:])
    return family


def mixed(seed: int, index: int) -> int:
    """Return 64 well-mixed bits for the `index`-th use of a seed (the finaliser of SplitMix64)."""
    state = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def _candidate_seed(seed: int, candidate: int) -> int:
    """Return the seed of a candidate's draws. The first candidate is what the request is without any others."""
    return mixed(~seed & _MASK, candidate) if candidate else seed
