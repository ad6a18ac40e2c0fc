"""The dialogue that a turn answers: what was kept, what is new, and the rules both obey."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

from gateway.content import MediaPart, Medium, Message, Role
from shared.errors import EmptyMessage, InvalidRequest, MediaTooLarge, MediaUnreadable


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for."""

    messages: int = 1000
    parts_per_message: int = 512
    text_chars: int = 1_000_000
    media: int = 64
    media_bytes: int = 32 << 20


@dataclass(frozen=True, slots=True)
class PlacedMedium:
    """A medium and the request field that it came in."""

    medium: Medium
    field: str


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Kept messages, then the request's own; the last one is to be answered."""

    system_message: str | None
    kept: tuple[Message, ...]
    new: tuple[Message, ...]

    @property
    def messages(self) -> tuple[Message, ...]:
        """All messages in order."""
        return self.kept + self.new

    @property
    def media(self) -> tuple[Medium, ...]:
        """All media in order of appearance."""
        return tuple(medium for message in self.messages for medium in message.media)

    @property
    def placed_media(self) -> tuple[PlacedMedium, ...]:
        """All media in order of appearance, with the request field that each came in."""
        kept = (PlacedMedium(medium, "conversation_id") for message in self.kept for medium in message.media)
        return (*kept, *(placed for index, message in enumerate(self.new) for placed in _placed(index, message)))


def check_dialogue(dialogue: Dialogue, limits: Limits) -> None:
    """Raise `InvalidRequest`, or one of its kinds, if the dialogue cannot be answered or is over a limit."""
    if not dialogue.new:
        raise InvalidRequest("There is no message to answer.", field="messages")
    _check_roles(dialogue)
    _check_counts(dialogue, limits)
    for placed in dialogue.placed_media:
        _check_content(placed, limits)
    if dialogue.new[-1].is_empty:
        raise EmptyMessage("The message to answer has neither text nor media.", field=_last_field(dialogue))


def check_continuation(messages: tuple[Message, ...]) -> None:
    """Raise `InvalidRequest` unless `messages` is what continues a kept conversation: one user message."""
    if len(messages) != 1:
        raise InvalidRequest("A kept conversation is continued by exactly one message.", field="messages")


def _check_roles(dialogue: Dialogue) -> None:
    first = len(dialogue.kept)
    expected = cycle((Role.USER, Role.ASSISTANT))
    for position, (message, role) in enumerate(zip(dialogue.messages, expected, strict=False)):
        place = f"messages[{position - first}]" if position >= first else "conversation_id"
        if message.role is not role:
            raise InvalidRequest("User and assistant alternate, and the user begins.", field=f"{place}.role")
        if message.role is Role.ASSISTANT and message.media:
            raise InvalidRequest("Only user messages hold media.", field=f"{place}.parts")
    if dialogue.new[-1].role is not Role.USER:
        raise InvalidRequest("The last message is the user's.", field=f"{_last_field(dialogue)}.role")


def _check_counts(dialogue: Dialogue, limits: Limits) -> None:
    if len(dialogue.messages) > limits.messages:
        raise InvalidRequest(f"A dialogue has at most {limits.messages} messages.", field="messages")
    for index, message in enumerate(dialogue.new):
        if len(message.parts) > limits.parts_per_message:
            raise InvalidRequest(
                f"A message has at most {limits.parts_per_message} parts.", field=f"messages[{index}].parts"
            )
    text_chars = len(dialogue.system_message or "") + sum(message.text_chars for message in dialogue.messages)
    if text_chars > limits.text_chars:
        raise InvalidRequest(f"A dialogue has at most {limits.text_chars} characters of text.", field="messages")
    if len(dialogue.media) > limits.media:
        raise InvalidRequest(f"A dialogue has at most {limits.media} media.", field="messages")


def _check_content(placed: PlacedMedium, limits: Limits) -> None:
    content = placed.medium.content
    if content is None:
        return
    if not content:
        raise MediaUnreadable("The picture has no bytes.", field=placed.field)
    if len(content) > limits.media_bytes:
        raise MediaTooLarge(f"A medium has at most {limits.media_bytes} bytes.", field=placed.field)


def _placed(index: int, message: Message) -> Iterator[PlacedMedium]:
    for number, part in enumerate(message.parts):
        if isinstance(part, MediaPart):
            place = f"messages[{index}].parts[{number}]"
            for position, medium in enumerate(part.media):
                yield PlacedMedium(medium, f"{place}.group.media[{position}]" if part.grouped else f"{place}.media")


def _last_field(dialogue: Dialogue) -> str:
    return f"messages[{len(dialogue.new) - 1}]"
