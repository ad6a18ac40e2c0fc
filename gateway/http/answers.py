"""What clients get over HTTP: the objects of OpenAI's API, and what this server tells beside them as `internvl`."""

from typing import Literal

from pydantic import BaseModel


class ErrorFacts(BaseModel):
    """What went wrong. `code` is an entry of `ErrorReason` in error.proto; `param` names the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """An error."""

    error: ErrorFacts


class FunctionFacts(BaseModel):
    """Which function is called; `arguments` is a JSON object as text."""

    name: str
    arguments: str


class ToolCallAnswer(BaseModel):
    """A call of a tool that the model asks for."""

    id: str
    type: Literal["function"]
    function: FunctionFacts


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCallAnswer] | None = None


class TopLogprob(BaseModel):
    """How likely a token was."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobAnswer(TopLogprob):
    """How likely the chosen token was, and the likeliest ones of its step."""

    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    """How likely the tokens of an answer were."""

    content: list[TokenLogprobAnswer]
    refusal: None = None


FinishReasonName = Literal["stop", "length", "tool_calls"]


class Choice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    finish_reason: FinishReasonName
    logprobs: Logprobs | None


class PromptTokensDetails(BaseModel):
    """Tokens of the prompt that did not have to be computed."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Timings(BaseModel):
    """Where the time went, in seconds; the first token is absent where none came. As `ChatTimings` of the gRPC API."""

    media_s: float
    queue_s: float
    prefill_s: float
    time_to_first_token_s: float | None
    decode_s: float
    total_s: float
    output_tokens_per_s: float


class SeenFrame(BaseModel):
    """A frame of a video that was seen."""

    index: int
    time_s: float


class Receipt(BaseModel):
    """What one medium cost. As `MediaReceipt` of the gRPC API; `media_digest` names it in an `ivl:sha256:` URL."""

    media_digest: str
    tile_count: int
    columns: int
    rows: int
    token_count: int
    cache_tier: str
    coalesced: bool
    preprocess_s: float
    queue_s: float
    encode_s: float
    embedding_size_bytes: int
    transfer_tier: str
    transfer_s: float
    transfer_size_bytes: int
    frames: list[SeenFrame]


class ServerFacts(BaseModel):
    """What this server tells beside OpenAI's API. `best_choice` is the index of the choice that ranks first."""

    request_id: str
    visual_tokens: int
    best_choice: int
    timings: Timings
    receipts: list[Receipt]


class ChatCompletion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    internvl: ServerFacts


class Model(BaseModel):
    """The model that is served; `max_model_len` is what its context holds."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    """All models that are served: one."""

    object: Literal["list"]
    data: list[Model]


class Tokenized(BaseModel):
    """The tokens of a text or a dialogue."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: None = None


class Health(BaseModel):
    """How the gateway is."""

    status: Literal["ok", "not ready"]


class StoredMediumAnswer(BaseModel):
    """A medium that is held, under the URL that names it in a message, until `expires_at` (seconds since 1970)."""

    url: str
    digest: str
    size_bytes: int
    expires_at: int
