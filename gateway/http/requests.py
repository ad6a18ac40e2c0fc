"""What clients send over HTTP: the bodies of OpenAI's API as far as they are understood here, each field checked."""

from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

# What a body may hold at most, whatever the gateway's own limits are set to; those are checked later and say more.
_MOST_MESSAGES: Final = 10_000
_MOST_PARTS: Final = 4096
_MOST_TOOLS: Final = 1024
_MOST_SEED: Final = (1 << 63) - 1
_MOST_TOKENS: Final = (1 << 31) - 1


class Body(BaseModel):
    """A JSON object whose fields are all known: a misspelt one must not be taken for absent."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


class TextContent(Body):
    """Text."""

    type: Literal["text"]
    text: str


class ImageUrl(Body):
    """A picture: `data:image/...;base64,...`, `ivl:sha256:...` for bytes sent before, or https where that is fetched.

    `detail` low is one tile, high is up to 24, auto is up to the checkpoint's own number. `max_dynamic_patch`, as
    LMDeploy calls it, is that number itself.
    """

    url: str
    detail: Literal["auto", "low", "high"] | None = None
    max_dynamic_patch: Annotated[int, Field(ge=1, le=1024)] | None = None


class ImageContent(Body):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


class VideoUrl(Body):
    """A video, by the same kinds of URL as a picture. `num_frames` of it are seen."""

    url: str
    num_frames: Annotated[int, Field(ge=1, le=1024)] | None = None


class VideoContent(Body):
    """A video."""

    type: Literal["video_url"]
    video_url: VideoUrl


Content: TypeAlias = Annotated[TextContent | ImageContent | VideoContent, Field(discriminator="type")]
Text: TypeAlias = str | Annotated[list[TextContent], Field(max_length=_MOST_PARTS)]


class SystemMessage(Body):
    """What the model is told before everything; at most one, and the first message."""

    role: Literal["system", "developer"]
    content: Text
    name: str | None = None


class UserMessage(Body):
    """What the user says."""

    role: Literal["user"]
    content: str | Annotated[list[Content], Field(max_length=_MOST_PARTS)]
    name: str | None = None


class FunctionCall(Body):
    """Which function is called; `arguments` is a JSON object as text."""

    name: str
    arguments: str


class MessageToolCall(Body):
    """A call that the assistant asked for."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(Body):
    """What the model said before. The fields from `refusal` on are what other servers send along; they are not read."""

    role: Literal["assistant"]
    content: Text | None = None
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=_MOST_TOOLS)] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(Body):
    """What a tool answered."""

    role: Literal["tool"]
    content: Text
    tool_call_id: str
    name: str | None = None


ChatMessage: TypeAlias = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class FunctionDefinition(Body):
    """A function that may be called; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(Body):
    """A tool that the model may ask for."""

    type: Literal["function"]
    function: FunctionDefinition


class StreamOptions(Body):
    """What a stream tells beside the text."""

    include_usage: bool = False
    include_obfuscation: bool | None = None
    continuous_usage_stats: Literal[False] | None = None


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """A JSON object."""

    type: Literal["json_object"]


class NamedSchema(Body):
    """A JSON schema; it is always followed, whatever `strict` says."""

    name: str = ""
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Body):
    """JSON by a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat: TypeAlias = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ProcessorOptions(Body):
    """How all pictures that do not say so themselves are cut, as vLLM calls it."""

    max_dynamic_patch: Annotated[int, Field(ge=1, le=1024)] | None = None


class VideoReading(Body):
    """How all videos that do not say so themselves are read."""

    num_frames: Annotated[int, Field(ge=1, le=1024)] | None = None


class ReadingOptions(Body):
    """How media are read, as vLLM calls it."""

    video: VideoReading | None = None


class ChatCompletionRequest(Body):
    """A dialogue to go on with."""

    model: str | None = Field(None, description="The served model's name, or none; its owner may stand before it.")
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=_MOST_MESSAGES)]

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = Field(None, description="Answers to give.")
    max_tokens: Annotated[int, Field(ge=1, le=_MOST_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=_MOST_TOKENS)] | None = Field(
        None, description="The newer name of `max_tokens`; it counts where both are given."
    )
    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(None, description="Absent: 1. Zero: greedy.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, le=_MOST_SEED)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolDefinition], Field(max_length=_MOST_TOOLS)] | None = None
    tool_choice: Literal["auto", "none"] | None = None

    top_k: Annotated[int, Field(ge=-1, le=_MOST_TOKENS)] | None = Field(None, description="vLLM's; -1 or 0: all.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="vLLM's.")
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = Field(None, description="vLLM's.")
    ignore_eos: bool | None = Field(None, description="vLLM's, for benchmarks.")
    skip_special_tokens: bool | None = Field(None, description="vLLM's; absent: true.")
    mm_processor_kwargs: ProcessorOptions | None = None
    media_io_kwargs: ReadingOptions | None = None
    max_total_tiles: Annotated[int, Field(ge=1, le=_MOST_TOKENS)] | None = Field(
        None, description="Ours: most tiles of all media together."
    )
    grounding: bool | None = Field(None, description="Ours: keep the tags of boxes and references, `<box>` and so on.")

    # What changes nothing here, and only in the one value that asks for nothing else.
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    # What is about the caller's own books.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class TokenizeTextRequest(Body):
    """Plain text to tokenize; nothing in it is read as a control token, and nothing is added to it."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = Field(None, description="vLLM's; there is nothing that it would add.")


class TokenizeChatRequest(Body):
    """A dialogue to tokenize, as it would be read."""

    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=_MOST_MESSAGES)]
    tools: Annotated[list[ToolDefinition], Field(max_length=_MOST_TOOLS)] | None = None
    mm_processor_kwargs: ProcessorOptions | None = None
    media_io_kwargs: ReadingOptions | None = None
    add_generation_prompt: Literal[True] | None = None
    add_special_tokens: Literal[False] | None = None
