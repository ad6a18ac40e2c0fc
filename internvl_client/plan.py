"""Plans a call of Chat: which pictures travel inline, which are uploaded, and the answer that its events make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from internvl_client import convert
from internvl_client.errors import MEDIA_NOT_FOUND, NotFoundError, ServerError
from internvl_client.types import (
    Answer,
    ChatEvent,
    Delta,
    Finished,
    Image,
    Message,
    Part,
    Started,
    TurnOptions,
)
from internvl_serving.gateway.v1 import chat_service_pb2

MAX_INLINE_BYTES: Final = 256 << 10
MAX_INLINE_TOTAL_BYTES: Final = 4 << 20
MAX_DIGESTS_PER_REQUEST: Final = 1000
_MAX_KNOWN_DIGESTS: Final = 10_000


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """A call of Chat that can be made more than once.

    `uploads` has the bytes that the server must hold before the call; `held` all bytes that could be uploaded should
    the server have lost them.
    """

    request: chat_service_pb2.ChatRequest
    uploads: Mapping[str, bytes]
    held: Mapping[str, bytes]

    def mends(self, error: NotFoundError) -> bool:
        """Return whether uploading what we hold may make the call succeed."""
        return error.reason == MEDIA_NOT_FOUND and (error.resource is None or error.resource in self.held)


def plan_chat(
    content: Iterable[Message | Part],
    options: TurnOptions,
    system_message: str | None = None,
    conversation_id: str = "",
    earlier: Mapping[str, Image] | None = None,
) -> ChatPlan:
    """Return the plan for `content`; `earlier` are the pictures of a kept conversation's previous turns."""
    messages = convert.dialogue_of(content)
    images = [image for message in messages for image in message.images]
    inline = inline_digests(images)
    bytes_of = _contents(images)
    return ChatPlan(
        convert.chat_request(messages, inline, options, system_message, conversation_id),
        uploads={digest: bytes_of[digest] for digest in bytes_of if digest not in inline},
        held=_contents((earlier or {}).values()) | bytes_of,
    )


def inline_digests(images: Sequence[Image]) -> frozenset[str]:
    """Return the digests of the pictures that travel in the request itself: small ones, while they are few."""
    chosen: set[str] = set()
    total = 0
    for image in images:
        size = len(image.content) if image.content is not None else MAX_INLINE_BYTES + 1
        # A picture that appears twice is sent twice, so it counts twice.
        if size <= MAX_INLINE_BYTES and total + size <= MAX_INLINE_TOTAL_BYTES:
            chosen.add(image.digest)
            total += size
        else:
            chosen.discard(image.digest)
    return frozenset(chosen)


class KnownDigests:
    """Digests that the server is believed to hold. Only saves calls: a wrong belief is corrected by MEDIA_NOT_FOUND."""

    def __init__(self) -> None:
        self._digests: set[str] = set()

    def unknown(self, digests: Iterable[str]) -> list[str]:
        """Return those of `digests` that the server has to be asked about."""
        return [digest for digest in digests if digest not in self._digests]

    def add(self, digests: Iterable[str]) -> None:
        """Believe that the server holds `digests`."""
        if len(self._digests) > _MAX_KNOWN_DIGESTS:
            self._digests.clear()
        self._digests.update(digests)

    def discard(self, digests: Iterable[str]) -> None:
        """Believe it no longer."""
        self._digests.difference_update(digests)


@dataclass(slots=True)
class AnswerCollector:
    """Gathers the events of one answer."""

    request_id: str
    started: Started | None = None
    finished: Finished | None = None
    _deltas: list[Delta] = field(default_factory=list)

    def add(self, event: ChatEvent) -> None:
        """Take the next event."""
        match event:
            case Started():
                self.started = event
            case Delta():
                self._deltas.append(event)
            case Finished():
                self.finished = event

    def answer(self) -> Answer:
        """Return the whole answer; raise `ServerError` when the stream ended before it was complete."""
        if self.started is None or self.finished is None:
            raise ServerError("The answer broke off before it was complete.", request_id=self.request_id)
        return Answer(
            text="".join(delta.text for delta in self._deltas),
            finish_reason=self.finished.finish_reason,
            usage=self.finished.usage,
            timings=self.finished.timings,
            receipts=self.finished.receipts,
            request_id=self.started.request_id or self.request_id,
            model=self.started.model,
            message_id=self.finished.message_id,
            prompt_token_ids=self.started.prompt_token_ids,
            token_ids=tuple(number for delta in self._deltas for number in delta.token_ids),
        )


def _contents(images: Iterable[Image]) -> dict[str, bytes]:
    return {image.digest: image.content for image in images if image.content is not None}
