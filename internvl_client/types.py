"""How a caller wants to be answered, and what it gets: settings, events, answers. All of it immutable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, TypeAlias, TypedDict

from internvl_client.content import Message, Part, Tool, ToolCall
from internvl_client.errors import InternVLError

Progress: TypeAlias = Callable[[int, int], object]


class FinishReason(StrEnum):
    """Why an answer ended.

    STOP: the model or a stop sequence ended it. LENGTH: a limit was reached. TOOL_CALLS: the model asks for tools.
    """

    UNSPECIFIED = "UNSPECIFIED"
    STOP = "STOP"
    LENGTH = "LENGTH"
    TOOL_CALLS = "TOOL_CALLS"


class RankingMethod(StrEnum):
    """How candidates are ranked. UNSPECIFIED: by the critic where the server has one, else by log-probability."""

    UNSPECIFIED = "UNSPECIFIED"
    LOG_PROBABILITY = "LOG_PROBABILITY"
    CRITIC = "CRITIC"


class ContextOverflow(StrEnum):
    """What happens where the model's context does not hold a dialogue.

    UNSPECIFIED: the request is refused with PROMPT_TOO_LONG. DROP_OLDEST_TURNS: the oldest turns are left out with
    their media, as few as must go; never the system message, never the last turn.
    """

    UNSPECIFIED = "UNSPECIFIED"
    DROP_OLDEST_TURNS = "DROP_OLDEST_TURNS"


class CacheTier(StrEnum):
    """Where an embedding came from; NONE means that the picture was encoded."""

    UNSPECIFIED = "UNSPECIFIED"
    NONE = "NONE"
    LOCAL = "LOCAL"
    STORE = "STORE"
    VISION = "VISION"
    PREFIX = "PREFIX"


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """How an answer is decoded. None takes the server's default, which is greedy decoding; zero is a value.

    Ranges and meanings are those of `internvl_serving.common.v1.GenerationConfig`. `json_schema` may be text or what
    `json.dumps` takes.
    """

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
    json_schema: str | Mapping[str, Any] = ""
    grounding: bool = False
    visual_position_stride: int | None = None
    include_special_tokens: bool = False


class GenerationOptions(TypedDict, total=False):
    """The fields of `GenerationConfig` as keyword arguments."""

    max_output_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop_sequences: tuple[str, ...]
    num_beams: int | None
    ignore_end: bool
    candidate_count: int | None
    top_logprobs: int | None
    json_schema: str | Mapping[str, Any]
    grounding: bool
    visual_position_stride: int | None
    include_special_tokens: bool


class TurnOptions(GenerationOptions, total=False):
    """Keyword arguments of every method that asks for an answer.

    `config` is the base that the generation options refine. `timeout_s` covers uploads and the whole answer.
    `request_id` (drawn when absent) finds the call in every service's log. `return_token_ids` asks for the ids.
    `tools` are functions that the model may ask to be called. `max_total_tiles` bounds the tiles of all new media
    together; each gets an equal share as its `max_tiles`, unless its own is smaller or the share is enough for what
    models do by themselves. `ranking_method` says how candidates are ranked. `context_overflow` says what happens to a
    dialogue that is too long for the model.

    For kept conversations only: `turn_id` (drawn when absent) names the turn, so that it can be sent again after an
    error and is answered once; it is unique in the conversation. `keep_partial_answer` has a turn kept that fails or is
    left once its answer has begun, with what was said until then, marked `cut_off`.
    """

    config: GenerationConfig
    timeout_s: float | None
    request_id: str | None
    return_token_ids: bool
    tools: Sequence[Tool]
    max_total_tiles: int | None
    ranking_method: RankingMethod
    context_overflow: ContextOverflow
    turn_id: str | None
    keep_partial_answer: bool


class ChatOptions(TurnOptions, total=False):
    """`TurnOptions` of a dialogue that is not kept. `system_message`: None is the model's own, "" an empty one."""

    system_message: str | None


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a batch with options of its own, which go before those of the batch."""

    content: tuple[Message | Part, ...]
    options: ChatOptions = field(default_factory=ChatOptions)


BatchItem: TypeAlias = str | Iterable[Message | Part] | Question


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and written: of the prompt, how many stood for pictures and how many the prefix cache held."""

    num_prompt_tokens: int
    num_visual_tokens: int
    num_cached_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a turn went, in seconds.

    `media_s`: until every picture had its embedding; `queue_s`: until the engine began to read the prompt;
    `prefill_s`: from there to the first token; `decode_s`: from the first token to the last.
    `time_to_first_token_s` and `total_s` count from the call's arrival at the gateway.
    """

    media_s: float
    queue_s: float
    prefill_s: float
    time_to_first_token_s: float
    decode_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class VideoFrame:
    """A frame that was seen: its number in the video, and when it is shown."""

    index: int
    time_s: float


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one medium cost. `columns` x `rows` is its tile grid; `num_tiles` counts thumbnails too.

    `frames` are those of a video that were seen, in order. One of a prefetch has no transfer: no model has read it yet.
    `embedding_bytes` is the embedding's size, `transfer_bytes` what the LLM service read of it for this turn.
    """

    media_digest: str
    num_tiles: int
    columns: int
    rows: int
    num_tokens: int
    cache_tier: CacheTier
    coalesced: bool
    preprocess_s: float
    encode_s: float
    transfer_tier: CacheTier
    transfer_s: float
    frames: tuple[VideoFrame, ...] = ()
    queue_s: float = 0.0
    embedding_bytes: int = 0
    transfer_bytes: int = 0

    @property
    def cache_hit(self) -> bool:
        """Whether a cache held the embedding, so that nothing was encoded for this turn."""
        return self.cache_tier is not CacheTier.NONE


Prefetched: TypeAlias = Receipt | InternVLError


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a picture of `width` x `height` pixels will take, if it is whole.

    `columns` x `rows` is its tile grid; `num_tiles` counts the thumbnail too.
    """

    width: int
    height: int
    columns: int
    rows: int
    num_tiles: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Started:
    """First event: the pictures are encoded and the prompt was accepted, without the oldest `num_dropped_turns`."""

    request_id: str
    model: str
    num_prompt_tokens: int
    prompt_token_ids: tuple[int, ...] = ()
    num_dropped_turns: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely a token was: the natural logarithm of its probability, and the likeliest tokens of its step.

    `token` is its text alone, in UTF-8, and may be no whole character.
    """

    token_id: int
    token: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """More text of one candidate. `str(delta)` is the text; it may be empty while a character is incomplete."""

    text: str
    token_ids: tuple[int, ...] = ()
    candidate_index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of the answers to a question. `score` is what it was ranked by.

    That is the mean of `step_scores`, a critic's scores of its steps (0 to 1), or else `mean_logprob`. Token ids and
    log-probabilities are there when they were asked for. Among the candidates of a `Finished` event the text, the ids
    and the log-probabilities are missing: the deltas have brought them.
    """

    finish_reason: FinishReason
    num_output_tokens: int
    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    mean_logprob: float = 0.0
    score: float = 0.0
    step_scores: tuple[float, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """Last event: the answer is complete and, in a kept conversation, stored under `message_id`.

    The candidate at `best_index` ranks first; it is the one that is stored. `replayed`: the turn was answered by an
    earlier call with its `turn_id`, which everything here is of; ids, log-probabilities and other candidates are gone.
    """

    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    receipts: tuple[Receipt, ...] = ()
    message_id: str = ""
    candidates: tuple[Candidate, ...] = ()
    best_index: int = 0
    replayed: bool = False


ChatEvent: TypeAlias = Started | Delta | Finished


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. `str(answer)` is the text. Token ids and log-probabilities are there when they were asked for.

    Where there are several candidates, the one at `best_index` is the answer. `num_dropped_turns` of the oldest turns
    were left out of the prompt. `replayed`: see `Finished`.
    """

    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    receipts: tuple[Receipt, ...]
    request_id: str
    model: str
    message_id: str = ""
    prompt_token_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    best_index: int = 0
    num_dropped_turns: int = 0
    replayed: bool = False

    def __str__(self) -> str:
        return self.text

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The tools that the model wants called."""
        return self.candidates[self.best_index].tool_calls if self.candidates else ()

    @property
    def message(self) -> Message:
        """The answer as the message that a dialogue goes on from."""
        return Message.assistant(*((self.text,) if self.text else ()), *self.tool_calls)

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed after the first token; 0 when there was only one."""
        steps = self.usage.num_output_tokens - 1
        return steps / self.timings.decode_s if steps > 0 and self.timings.decode_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class ConversationInfo:
    """A kept dialogue as it stands after its last finished turn, without its messages."""

    conversation_id: str
    system_message: str | None
    num_messages: int
    create_time: datetime
    expire_time: datetime


@dataclass(frozen=True, slots=True)
class UploadedMedia:
    """A medium that the server holds until `expire_time`, unless it is used again."""

    digest: str
    size_bytes: int
    expire_time: datetime


class BatchState(StrEnum):
    """How a batch stands: at work, every item has a result, or ended early."""

    UNSPECIFIED = "UNSPECIFIED"
    RUNNING = "RUNNING"
    DONE = "DONE"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True, slots=True)
class BatchInfo:
    """A batch as it stands, without its results. It is forgotten at `expire_time`, unless it is still at work."""

    batch_id: str
    state: BatchState
    num_items: int
    num_succeeded: int
    num_failed: int
    create_time: datetime
    expire_time: datetime
