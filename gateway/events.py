"""What is asked of a turn and what comes back: configuration, events, candidates, receipts, timings."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from gateway.content import Message, ToolCall
from gateway.prompt import EmbeddingHandle, Prompt, Tool


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """How the answer is decoded. None leaves a choice to the LLM service, which also checks the values."""

    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop_sequences: tuple[str, ...] = ()
    num_beams: int | None = None
    ignore_end: bool = False
    candidate_count: int | None = None
    top_logprobs: int | None = None
    json_schema: str = ""
    grounding: bool = False
    visual_position_stride: int | None = None
    include_special_tokens: bool = False


class RankingMethod(StrEnum):
    """How candidates are ranked. UNSPECIFIED: by the critic where there is one, else by log-probability."""

    UNSPECIFIED = "UNSPECIFIED"
    LOG_PROBABILITY = "LOG_PROBABILITY"
    CRITIC = "CRITIC"


class ContextOverflow(StrEnum):
    """What happens where the context does not hold a dialogue. UNSPECIFIED: it is refused."""

    UNSPECIFIED = "UNSPECIFIED"
    DROP_OLDEST_TURNS = "DROP_OLDEST_TURNS"


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A turn to answer: the next messages of a kept conversation, or a whole dialogue.

    `turn_id` is the client's name for a turn of a kept conversation, which is answered once under it.
    `keep_partial_answer`: such a turn is kept, too, if it ends before the answer does.
    """

    messages: tuple[Message, ...]
    conversation_id: str = ""
    system_message: str | None = None
    config: GenerationConfig = GenerationConfig()
    return_token_ids: bool = False
    tools: tuple[Tool, ...] = ()
    max_total_tiles: int | None = None
    ranking_method: RankingMethod = RankingMethod.UNSPECIFIED
    in_background: bool = False
    turn_id: str = ""
    keep_partial_answer: bool = False
    context_overflow: ContextOverflow = ContextOverflow.UNSPECIFIED


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A prompt to answer; `in_background` where nobody waits for every token.

    `conversation_id`: whose earlier turns some replica may have read; it goes no further than to the choice of one.
    """

    prompt: Prompt
    config: GenerationConfig = GenerationConfig()
    return_token_ids: bool = False
    in_background: bool = False
    conversation_id: str = ""
    context_overflow: ContextOverflow = ContextOverflow.UNSPECIFIED


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model that answers; its context holds prompt and answer together."""

    name: str
    max_context_tokens: int


class CacheTier(StrEnum):
    """Where an embedding came from."""

    UNSPECIFIED = "UNSPECIFIED"
    NONE = "NONE"
    LOCAL = "LOCAL"
    STORE = "STORE"
    VISION = "VISION"
    PREFIX = "PREFIX"


class FinishReason(StrEnum):
    """Why an answer ended."""

    UNSPECIFIED = "UNSPECIFIED"
    STOP = "STOP"
    LENGTH = "LENGTH"
    TOOL_CALLS = "TOOL_CALLS"


@dataclass(frozen=True, slots=True)
class VideoFrame:
    """A frame that was seen: its number in the video, and when it is shown."""

    index: int
    time_s: float


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the vision service said about a medium: its handle, its tile grid and what it cost.

    `size_bytes` are the embedding's.
    """

    handle: EmbeddingHandle
    cache_tier: CacheTier
    columns: int = 1
    rows: int = 1
    coalesced: bool = False
    preprocess_s: float = 0.0
    encode_s: float = 0.0
    frames: tuple[VideoFrame, ...] = ()
    queue_s: float = 0.0
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Transfer:
    """How one embedding reached the engine; no bytes where its KV cache had what they would become."""

    digest: str
    cache_tier: CacheTier
    duration_s: float
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Tokens read and written."""

    prompt_tokens: int = 0
    visual_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Started:
    """The prompt was accepted, without the dialogue's oldest `dropped_turns`."""

    model: str
    prompt_token_count: int
    prompt_token_ids: tuple[int, ...] = ()
    dropped_turns: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely a token was: the natural logarithm of its probability, and the likeliest tokens of its step."""

    token_id: int
    token: bytes
    logprob: float
    top: tuple["TokenLogprob", ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """Text of one candidate that became certain since the last event."""

    text: str
    token_ids: tuple[int, ...] = ()
    candidate_index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class CandidateResult:
    """How the LLM service says that one candidate ended."""

    finish_reason: FinishReason
    output_tokens: int = 0
    mean_logprob: float = 0.0
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A whole candidate, and what it is ranked by. `step_scores` are a critic's, 0 to 1; none without one."""

    text: str
    result: CandidateResult
    step_scores: tuple[float, ...] = ()
    score: float = 0.0


@dataclass(frozen=True, slots=True)
class Generated:
    """The LLM service's last word on an answer. An LLM service that knows no candidates names none.

    `replica` is the address of who answered; for logs and traces, never for clients.
    """

    finish_reason: FinishReason
    usage: TokenUsage = TokenUsage()
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    transfers: tuple[Transfer, ...] = ()
    candidates: tuple[CandidateResult, ...] = ()
    replica: str = ""

    @property
    def output_tokens_per_s(self) -> float:
        """Tokens per second after the first of each candidate; 0 where that was all."""
        following = self.usage.output_tokens - max(1, len(self.candidates))
        return following / self.decode_s if following > 0 and self.decode_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class MediaReceipt:
    """What one medium cost. `transfer` is None where the LLM service did not say."""

    media_digest: str
    encoded: Encoded
    transfer: Transfer | None


@dataclass(frozen=True, slots=True)
class ChatTimings:
    """Where the time of a turn went, from the call's arrival at the gateway. No first token: there was no delta."""

    media_s: float
    time_to_first_token_s: float | None
    total_s: float


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete. `message_id` is empty where it is not kept, or could not be.

    `candidates` are in the order of their indices; the one at `best_index` ranks first. `replayed`: the turn was
    answered by an earlier call, which `generated`, `timings` and `receipts` are of.
    """

    generated: Generated
    timings: ChatTimings
    candidates: tuple[Candidate, ...]
    best_index: int = 0
    receipts: tuple[MediaReceipt, ...] = field(default=())
    message_id: str = ""
    replayed: bool = False

    @property
    def best(self) -> Candidate:
        """The candidate that ranks first."""
        return self.candidates[self.best_index]


GenerateEvent: TypeAlias = Started | Delta | Generated
ChatEvent: TypeAlias = Started | Delta | Finished
