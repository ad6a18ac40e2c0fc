"""Plans a call: which media travel inline, which are uploaded, and the answer that its events make."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from internvl_client import convert
from internvl_client.content import Media, Message, Part
from internvl_client.errors import MEDIA_NOT_FOUND, NotFoundError, ServerError
from internvl_client.types import (
    Answer,
    BatchItem,
    Candidate,
    ChatEvent,
    ChatOptions,
    Delta,
    Finished,
    Question,
    Started,
    TurnOptions,
)
from internvl_serving.gateway.v1 import batch_service_pb2, chat_service_pb2

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

    @property
    def is_named(self) -> bool:
        """Whether its turn has an id, so that it can be sent again and is answered once."""
        return bool(self.request.turn_id)

    def mends(self, error: NotFoundError) -> bool:
        """Return whether uploading what we hold may make the call succeed."""
        return error.reason == MEDIA_NOT_FOUND and (error.resource is None or error.resource in self.held)


def plan_chat(
    content: Iterable[Message | Part],
    options: TurnOptions,
    system_message: str | None = None,
    conversation_id: str = "",
    earlier: Mapping[str, Media] | None = None,
) -> ChatPlan:
    """Return the plan for `content`; `earlier` are the media of a kept conversation's previous turns."""
    messages = convert.dialogue_of(content)
    media = [medium for message in messages for medium in message.media]
    inline = inline_digests(media)
    bytes_of = _contents(media)
    return ChatPlan(
        convert.chat_request(messages, inline, options, system_message, conversation_id),
        uploads={digest: bytes_of[digest] for digest in bytes_of if digest not in inline},
        held=_contents((earlier or {}).values()) | bytes_of,
    )


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """A call of CreateBatch; `uploads` has the bytes that the server must hold before it."""

    request: batch_service_pb2.CreateBatchRequest
    uploads: Mapping[str, bytes]


def plan_batch(
    items: Iterable[BatchItem], options: ChatOptions, concurrency: int | None, ttl_s: float | None
) -> BatchPlan:
    """Return the plan for questions that are independent of one another; a bare text is a question too."""
    questions = [_question_of(item, options) for item in items]
    dialogues = [convert.dialogue_of(question.content) for question in questions]
    media = [medium for messages in dialogues for message in messages for medium in message.media]
    inline = inline_digests(media)
    requests = [
        convert.chat_request(messages, inline, question.options, question.options.get("system_message"), "")
        for messages, question in zip(dialogues, questions, strict=True)
    ]
    return BatchPlan(
        batch_service_pb2.CreateBatchRequest(items=requests, concurrency=concurrency or 0, ttl=convert.duration(ttl_s)),
        uploads={digest: content for digest, content in _contents(media).items() if digest not in inline},
    )


def inline_digests(media: Sequence[Media]) -> frozenset[str]:
    """Return the digests of the media that travel in the request itself: small ones, while they are few."""
    chosen: set[str] = set()
    total = 0
    for medium in media:
        size = len(medium.content) if medium.content is not None else MAX_INLINE_BYTES + 1
        # What appears twice is sent twice, so it counts twice.
        if size <= MAX_INLINE_BYTES and total + size <= MAX_INLINE_TOTAL_BYTES:
            chosen.add(medium.digest)
            total += size
        else:
            chosen.discard(medium.digest)
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
        candidates = self._candidates(self.finished)
        best = candidates[self.finished.best_index]
        return Answer(
            text=best.text,
            finish_reason=self.finished.finish_reason,
            usage=self.finished.usage,
            timings=self.finished.timings,
            receipts=self.finished.receipts,
            request_id=self.started.request_id or self.request_id,
            model=self.started.model,
            message_id=self.finished.message_id,
            prompt_token_ids=self.started.prompt_token_ids,
            token_ids=best.token_ids,
            logprobs=best.logprobs,
            candidates=candidates,
            best_index=self.finished.best_index,
            num_dropped_turns=self.started.num_dropped_turns,
            replayed=self.finished.replayed,
        )

    def _candidates(self, finished: Finished) -> tuple[Candidate, ...]:
        said: defaultdict[int, list[Delta]] = defaultdict(list)
        for delta in self._deltas:
            said[delta.candidate_index].append(delta)
        return tuple(
            replace(
                candidate,
                text="".join(delta.text for delta in said[index]),
                token_ids=tuple(number for delta in said[index] for number in delta.token_ids),
                logprobs=tuple(logprob for delta in said[index] for logprob in delta.logprobs),
            )
            for index, candidate in enumerate(finished.candidates or (_only_candidate(finished),))
        )


def _question_of(item: BatchItem, options: ChatOptions) -> Question:
    if isinstance(item, Question):
        return Question(item.content, ChatOptions({**options, **item.options}))
    return Question((item,) if isinstance(item, str) else tuple(item), options)


def _only_candidate(finished: Finished) -> Candidate:
    """Return the candidate of a server that names none."""
    return Candidate(finished.finish_reason, finished.usage.num_output_tokens)


def _contents(media: Iterable[Media]) -> dict[str, bytes]:
    return {medium.digest: medium.content for medium in media if medium.content is not None}
