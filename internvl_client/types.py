"""What a caller sends and gets: pictures, messages, generation settings, events, answers. All of it immutable."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TypeAlias, TypedDict


class Role(StrEnum):
    """Who speaks."""

    UNSPECIFIED = "UNSPECIFIED"
    USER = "USER"
    ASSISTANT = "ASSISTANT"


class FinishReason(StrEnum):
    """Why an answer ended: the model or a stop sequence ended it (STOP), or a limit was reached (LENGTH)."""

    UNSPECIFIED = "UNSPECIFIED"
    STOP = "STOP"
    LENGTH = "LENGTH"


class CacheTier(StrEnum):
    """Where an embedding came from; NONE means that the picture was encoded."""

    UNSPECIFIED = "UNSPECIFIED"
    NONE = "NONE"
    LOCAL = "LOCAL"
    STORE = "STORE"
    VISION = "VISION"
    PREFIX = "PREFIX"


@dataclass(frozen=True, slots=True)
class Image:
    """A picture, named by the SHA-256 of its encoded bytes (JPEG, PNG, WebP, GIF, BMP or TIFF).

    Without `content` the server must hold the bytes already. `max_tiles` (without the thumbnail) and `thumbnail` decide
    how the picture is tiled; None leaves that to the model.
    """

    digest: str
    content: bytes | None = field(default=None, repr=False, compare=False)
    max_tiles: int | None = None
    thumbnail: bool | None = None

    @classmethod
    def open(cls, path: str | Path, *, max_tiles: int | None = None, thumbnail: bool | None = None) -> Image:
        """Return the picture in a file; raises `OSError` when it cannot be read. The bytes are not decoded here."""
        return cls.from_bytes(Path(path).read_bytes(), max_tiles=max_tiles, thumbnail=thumbnail)

    @classmethod
    def from_bytes(cls, content: bytes, *, max_tiles: int | None = None, thumbnail: bool | None = None) -> Image:
        """Return the picture that `content` encodes."""
        return cls(hashlib.sha256(content).hexdigest(), content, max_tiles, thumbnail)

    @classmethod
    def from_digest(cls, digest: str, *, max_tiles: int | None = None, thumbnail: bool | None = None) -> Image:
        """Return a picture whose bytes the server holds: 64 lower-case hex digits."""
        return cls(digest, None, max_tiles, thumbnail)


@dataclass(frozen=True, slots=True)
class ImageGroup:
    """Several pictures that the model sees as one run of tiles: the model card's combined form."""

    images: tuple[Image, ...]

    @classmethod
    def of(cls, *images: Image) -> ImageGroup:
        """Return the group of `images`, at least one, in order."""
        return cls(images)


Part: TypeAlias = str | Image | ImageGroup


@dataclass(frozen=True, slots=True)
class Message:
    """One entry of a dialogue. `message_id` and `create_time` are set by the server in kept conversations.

    The server puts a newline after a picture when another picture follows, or text that does not begin with white
    space; nothing else is inserted between parts.
    """

    role: Role
    parts: tuple[Part, ...]
    message_id: str = ""
    create_time: datetime | None = None

    @classmethod
    def user(cls, *parts: Part) -> Message:
        """Return what the person or program that asks says."""
        return cls(Role.USER, parts)

    @classmethod
    def assistant(cls, *parts: Part) -> Message:
        """Return what the model said."""
        return cls(Role.ASSISTANT, parts)

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> tuple[Image, ...]:
        """The pictures, those of groups included, in order."""
        found: list[Image] = []
        for part in self.parts:
            if isinstance(part, Image):
                found.append(part)
            elif isinstance(part, ImageGroup):
                found += part.images
        return tuple(found)


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """How an answer is decoded. None takes the server's default, which is greedy decoding; zero is a value.

    Ranges and meanings are those of `internvl_serving.common.v1.GenerationConfig`.
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


class TurnOptions(GenerationOptions, total=False):
    """Keyword arguments of every method that asks for an answer.

    `config` is the base that the generation options refine. `timeout_s` covers uploads and the whole answer.
    `request_id` (drawn when absent) finds the call in every service's log. `return_token_ids` asks for the ids.
    """

    config: GenerationConfig
    timeout_s: float | None
    request_id: str | None
    return_token_ids: bool


class ChatOptions(TurnOptions, total=False):
    """`TurnOptions` of a dialogue that is not kept. `system_message`: None is the model's own, "" an empty one."""

    system_message: str | None


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
class Receipt:
    """What one picture cost. `columns` x `rows` is its tile grid; `num_tiles` counts the thumbnail too."""

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

    @property
    def cache_hit(self) -> bool:
        """Whether a cache held the embedding, so that nothing was encoded for this turn."""
        return self.cache_tier is not CacheTier.NONE


@dataclass(frozen=True, slots=True)
class Started:
    """First event: the pictures are encoded and the prompt was accepted."""

    request_id: str
    model: str
    num_prompt_tokens: int
    prompt_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """More text. `str(delta)` is the text; it may be empty while a character is incomplete."""

    text: str
    token_ids: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Finished:
    """Last event: the answer is complete and, in a kept conversation, stored under `message_id`."""

    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    receipts: tuple[Receipt, ...] = ()
    message_id: str = ""


ChatEvent: TypeAlias = Started | Delta | Finished


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. `str(answer)` is the text. Token ids are there when they were asked for."""

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

    def __str__(self) -> str:
        return self.text

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
    """A picture that the server holds until `expire_time`, unless it is used again."""

    digest: str
    size_bytes: int
    expire_time: datetime
