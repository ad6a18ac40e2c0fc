"""How a conversation is written down: JSON of text, digests and options, checked when it is read back."""

from collections.abc import Sequence
from datetime import datetime

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from gateway.content import MediaPart, Medium, Message, Part, PreprocessOptions, Role, TextPart


class _Record(BaseModel):
    # Fields that a newer replica adds are ignored by an older one.
    model_config = ConfigDict(frozen=True, extra="ignore")


class ConversationRecord(_Record):
    """What is known of a conversation besides its messages."""

    system_message: str | None
    ttl_s: int = Field(ge=1)
    create_time: AwareDatetime


class _MediumRecord(_Record):
    digest: str = Field(pattern="^[0-9a-f]{64}$")
    max_tiles: int | None = None
    thumbnail: bool | None = None


class _PartRecord(_Record):
    text: str = ""
    media: tuple[_MediumRecord, ...] = ()
    grouped: bool = False


class _MessageRecord(_Record):
    message_id: str = Field(min_length=1)
    role: Role
    create_time: AwareDatetime
    parts: tuple[_PartRecord, ...]


def write_message(message: Message, message_id: str, create_time: datetime) -> str:
    """Return the JSON of a message whose media all have their digests."""
    parts = tuple(_part_record(part) for part in message.parts)
    record = _MessageRecord(message_id=message_id, role=message.role, create_time=create_time, parts=parts)
    return record.model_dump_json(exclude_defaults=True)


def read_message(value: bytes) -> Message:
    """Return the message that `write_message` wrote; raise `ValueError` for anything else."""
    record = _MessageRecord.model_validate_json(value)
    return Message(record.role, tuple(map(_part, record.parts)), record.message_id, record.create_time)


def read_messages(values: Sequence[bytes | None]) -> tuple[Message, ...]:
    """Return the messages that `values` hold; raise `ValueError` if one is missing or unreadable."""
    return tuple(read_message(value or b"") for value in values)


def _part_record(part: Part) -> _PartRecord:
    if isinstance(part, TextPart):
        return _PartRecord(text=part.text)
    return _PartRecord(media=tuple(map(_medium_record, part.media)), grouped=part.grouped)


def _medium_record(medium: Medium) -> _MediumRecord:
    options = medium.options
    return _MediumRecord(digest=medium.digest, max_tiles=options.max_tiles, thumbnail=options.thumbnail)


def _part(record: _PartRecord) -> Part:
    if not record.media:
        return TextPart(record.text)
    return MediaPart(tuple(map(_medium, record.media)), record.grouped)


def _medium(record: _MediumRecord) -> Medium:
    return Medium(record.digest, PreprocessOptions(record.max_tiles, record.thumbnail))
