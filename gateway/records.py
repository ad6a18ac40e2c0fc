"""How conversations and batches are written down: JSON of text, digests and options, checked when it is read back."""

from collections.abc import Sequence
from datetime import datetime

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from gateway.content import MediaPart, Medium, Message, Part, PreprocessOptions, Role, TextPart, ToolCall, VideoOptions


class _Record(BaseModel):
    # Fields that a newer replica adds are ignored by an older one.
    model_config = ConfigDict(frozen=True, extra="ignore")


class ConversationRecord(_Record):
    """What is known of a conversation besides its messages."""

    system_message: str | None
    ttl_s: int = Field(ge=1)
    create_time: AwareDatetime


class BatchRecord(_Record):
    """What is known of a batch besides its items and results. `request_id` begins those of its items."""

    item_count: int = Field(ge=1)
    concurrency: int = Field(ge=1)
    ttl_s: int = Field(ge=1)
    create_time: AwareDatetime
    request_id: str


class _VideoRecord(_Record):
    segment_count: int | None = None
    start_s: float | None = None
    end_s: float | None = None


class _MediumRecord(_Record):
    digest: str = Field(pattern="^[0-9a-f]{64}$")
    max_tiles: int | None = None
    thumbnail: bool | None = None
    video: _VideoRecord | None = None


class _CallRecord(_Record):
    name: str
    arguments_json: str
    tool_call_id: str


class _PartRecord(_Record):
    text: str = ""
    media: tuple[_MediumRecord, ...] = ()
    grouped: bool = False
    call: _CallRecord | None = None


class _MessageRecord(_Record):
    message_id: str = Field(min_length=1)
    role: Role
    create_time: AwareDatetime
    parts: tuple[_PartRecord, ...]
    cut_off: bool = False


def write_message(message: Message, message_id: str, create_time: datetime) -> str:
    """Return the JSON of a message whose media all have their digests."""
    parts = tuple(_part_record(part) for part in message.parts)
    record = _MessageRecord(
        message_id=message_id, role=message.role, create_time=create_time, parts=parts, cut_off=message.cut_off
    )
    return record.model_dump_json(exclude_defaults=True)


def read_message(value: bytes) -> Message:
    """Return the message that `write_message` wrote; raise `ValueError` for anything else."""
    record = _MessageRecord.model_validate_json(value)
    return Message(record.role, tuple(map(_part, record.parts)), record.message_id, record.create_time, record.cut_off)


def read_messages(values: Sequence[bytes | None]) -> tuple[Message, ...]:
    """Return the messages that `values` hold; raise `ValueError` if one is missing or unreadable."""
    return tuple(read_message(value or b"") for value in values)


def _part_record(part: Part) -> _PartRecord:
    match part:
        case TextPart():
            return _PartRecord(text=part.text)
        case ToolCall():
            call = _CallRecord(name=part.name, arguments_json=part.arguments_json, tool_call_id=part.tool_call_id)
            return _PartRecord(call=call)
        case MediaPart():
            return _PartRecord(media=tuple(map(_medium_record, part.media)), grouped=part.grouped)


def _medium_record(medium: Medium) -> _MediumRecord:
    options, video = medium.options, medium.options.video
    return _MediumRecord(
        digest=medium.digest,
        max_tiles=options.max_tiles,
        thumbnail=options.thumbnail,
        video=None
        if video is None
        else _VideoRecord(segment_count=video.segment_count, start_s=video.start_s, end_s=video.end_s),
    )


def _part(record: _PartRecord) -> Part:
    if record.call:
        return ToolCall(record.call.name, record.call.arguments_json, record.call.tool_call_id)
    if record.media:
        return MediaPart(tuple(map(_medium, record.media)), record.grouped)
    return TextPart(record.text)


def _medium(record: _MediumRecord) -> Medium:
    return Medium(record.digest, PreprocessOptions(record.max_tiles, record.thumbnail, _video(record.video)))


def _video(record: _VideoRecord | None) -> VideoOptions | None:
    return None if record is None else VideoOptions(record.segment_count, record.start_s, record.end_s)
