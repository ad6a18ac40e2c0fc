"""The dialogue that a turn answers: what was kept, what is new, and the rules both obey."""

import json
import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

from gateway.content import MediaPart, Medium, Message, Role, ToolCall
from shared.errors import EmptyMessage, InvalidRequest, MediaTooLarge, MediaUnreadable


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for."""

    messages: int = 1000
    parts_per_message: int = 512
    text_chars: int = 1_000_000
    media: int = 64
    media_bytes: int = 32 << 20
    tools: int = 128


@dataclass(frozen=True, slots=True)
class PlacedMedium:
    """A medium and the request field that it came in."""

    medium: Medium
    field: str


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Kept messages, then the request's own; the last one is to be answered.

    The oldest `dropped_turns` were left out of it, and with them the first `dropped_new` of the request's messages.
    """

    system_message: str | None
    kept: tuple[Message, ...]
    new: tuple[Message, ...]
    dropped_turns: int = 0
    dropped_new: int = 0

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
        new = enumerate(self.new, self.dropped_new)
        return (*kept, *(placed for index, message in new for placed in _placed(index, message)))

    def without_oldest_turns(self, count: int) -> "Dialogue":
        """Return the dialogue with `count` turns less: users' messages, each with what follows until the user's next.

        The system message and the last turn stay.
        """
        starts = self._turn_starts
        count = min(count, len(starts) - 1)
        if count <= 0:
            return self
        first = starts[count]
        from_new = max(0, first - len(self.kept))
        return Dialogue(
            self.system_message,
            self.kept[first:],
            self.new[from_new:],
            self.dropped_turns + count,
            self.dropped_new + from_new,
        )

    def within(self, limits: Limits) -> "Dialogue":
        """Return the dialogue without its oldest turns, as few as must go for `limits`; the last turn stays."""
        counts = range(len(self._turn_starts))
        return self.without_oldest_turns(
            bisect_left(counts, True, key=lambda count: _is_within(self.without_oldest_turns(count), limits))
        )

    @property
    def text_chars(self) -> int:
        """Its characters of text, the system message and calls of tools included."""
        return len(self.system_message or "") + sum(message.text_chars for message in self.messages)

    @property
    def _turn_starts(self) -> list[int]:
        return [index for index, message in enumerate(self.messages) if message.role is Role.USER]


def check_dialogue(dialogue: Dialogue, limits: Limits) -> None:
    """Raise `InvalidRequest`, or one of its kinds, if the dialogue cannot be answered or is over a limit."""
    if not dialogue.new:
        raise InvalidRequest("There is no message to answer.", field="messages")
    _check_roles(dialogue)
    _check_counts(dialogue, limits)
    for placed in dialogue.placed_media:
        check_medium(placed, limits)
    if dialogue.new[-1].role is Role.USER and dialogue.new[-1].is_empty:  # a tool may have nothing to say
        raise EmptyMessage("The message to answer has neither text nor media.", field=_last_field(dialogue))


def check_continuation(messages: tuple[Message, ...]) -> None:
    """Raise `InvalidRequest` unless `messages` may continue a kept conversation: one user's, or results of tools."""
    if len(messages) != 1 and not (messages and all(message.role is Role.TOOL for message in messages)):
        raise InvalidRequest(
            "A kept conversation is continued by exactly one message, or by results of tools.", field="messages"
        )


def _check_roles(dialogue: Dialogue) -> None:
    first = len(dialogue.kept)
    waiting_calls = 0
    previous: Role | None = None
    for position, message in enumerate(dialogue.messages):
        index = position - first + dialogue.dropped_new
        place = f"messages[{index}]" if position >= first else "conversation_id"
        _check_role(message.role, previous, waiting_calls, f"{place}.role")
        _check_parts(message, place)
        waiting_calls = waiting_calls - 1 if message.role is Role.TOOL else len(message.tool_calls)
        previous = message.role
    if dialogue.new[-1].role is Role.ASSISTANT:
        raise InvalidRequest("The last message is the user's or a tool's.", field=f"{_last_field(dialogue)}.role")


def _check_role(role: Role, previous: Role | None, waiting_calls: int, field: str) -> None:
    if role is Role.TOOL and not waiting_calls:
        raise InvalidRequest("A tool's message follows a message that calls it, one for each call.", field=field)
    before = {Role.USER: (None, Role.ASSISTANT), Role.ASSISTANT: (Role.USER, Role.TOOL)}
    if role is not Role.TOOL and previous not in before[role]:
        raise InvalidRequest("User and assistant alternate, and the user begins.", field=field)


def _check_parts(message: Message, place: str) -> None:
    if message.role is not Role.USER and message.media:
        raise InvalidRequest("Only user messages hold media.", field=f"{place}.parts")
    if message.role is not Role.ASSISTANT and message.tool_calls:
        raise InvalidRequest("Only the assistant's messages call tools.", field=f"{place}.parts")
    for index, part in enumerate(message.parts):
        if isinstance(part, ToolCall):
            _check_call(part, f"{place}.parts[{index}].tool_call")


def _check_call(call: ToolCall, field: str) -> None:
    if not call.name:
        raise InvalidRequest("A call names its tool.", field=f"{field}.name")
    if not is_json_object(call.arguments_json):
        raise InvalidRequest("The arguments of a call are a JSON object.", field=f"{field}.arguments_json")


def is_json_object(text: str) -> bool:
    """Return whether `text` is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _check_counts(dialogue: Dialogue, limits: Limits) -> None:
    if len(dialogue.messages) > limits.messages:
        raise InvalidRequest(f"A dialogue has at most {limits.messages} messages.", field="messages")
    for index, message in enumerate(dialogue.new, dialogue.dropped_new):
        if len(message.parts) > limits.parts_per_message:
            raise InvalidRequest(
                f"A message has at most {limits.parts_per_message} parts.", field=f"messages[{index}].parts"
            )
    if dialogue.text_chars > limits.text_chars:
        raise InvalidRequest(f"A dialogue has at most {limits.text_chars} characters of text.", field="messages")
    if len(dialogue.media) > limits.media:
        raise InvalidRequest(f"A dialogue has at most {limits.media} media.", field="messages")


def _is_within(dialogue: Dialogue, limits: Limits) -> bool:
    return (
        len(dialogue.messages) <= limits.messages
        and len(dialogue.media) <= limits.media
        and dialogue.text_chars <= limits.text_chars
    )


def check_medium(placed: PlacedMedium, limits: Limits) -> None:
    """Raise `InvalidRequest` unless a medium's bytes, where it brings them, and its options can be meant."""
    _check_video(placed)
    content = placed.medium.content
    if content is None:
        return
    if not content:
        raise MediaUnreadable("The medium has no bytes.", field=placed.field)
    if len(content) > limits.media_bytes:
        raise MediaTooLarge(f"A medium has at most {limits.media_bytes} bytes.", field=placed.field)


def _check_video(placed: PlacedMedium) -> None:
    video = placed.medium.options.video
    if video is None:
        return
    field = f"{placed.field}.options.video"
    if ".group." in placed.field:
        raise InvalidRequest("A group holds pictures and no videos.", field=field)
    if video.segment_count is not None and video.segment_count < 1:
        raise InvalidRequest("A video has at least one segment.", field=f"{field}.segment_count")
    for name, bound_s in (("start_seconds", video.start_s), ("end_seconds", video.end_s)):
        if bound_s is not None and not math.isfinite(bound_s):
            raise InvalidRequest("A bound is a number of seconds.", field=f"{field}.{name}")


def _placed(index: int, message: Message) -> Iterator[PlacedMedium]:
    for number, part in enumerate(message.parts):
        if isinstance(part, MediaPart):
            place = f"messages[{index}].parts[{number}]"
            for position, medium in enumerate(part.media):
                yield PlacedMedium(medium, f"{place}.group.media[{position}]" if part.grouped else f"{place}.media")


def _last_field(dialogue: Dialogue) -> str:
    return f"messages[{len(dialogue.new) - 1 + dialogue.dropped_new}]"
