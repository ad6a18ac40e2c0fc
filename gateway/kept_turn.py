"""A turn of a kept conversation that a client has named: how it went, so that it is told again and not asked twice."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import BaseModel, ConfigDict, Field

from gateway.content import Message
from gateway.events import Candidate, ChatEvent, Delta, Finished, MediaReceipt, Started


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a turn went. No `finished`: it was cut off."""

    started: Started
    finished: Finished | None = None


@dataclass(frozen=True, slots=True)
class KeptTurn:
    """A turn as it was kept: its messages, the answer last, from `position` on among the conversation's."""

    position: int
    messages: tuple[Message, ...]
    is_last: bool
    outcome: Outcome

    @property
    def is_cut_off(self) -> bool:
        """Whether it has no end, so that it may be answered again."""
        return self.outcome.finished is None

    def asks(self, messages: Sequence[Message]) -> bool:
        """Return whether it is the answer to `messages`."""
        return [_said(message) for message in self.messages[:-1]] == [_said(message) for message in messages]

    def events(self) -> tuple[ChatEvent, ...]:
        """Return the answer once more: what is not kept of it are token ids, log-probabilities and other candidates."""
        assert self.outcome.finished is not None
        answer, finished = self.messages[-1], self.outcome.finished
        result = replace(finished.best.result, tool_calls=answer.tool_calls)
        best = replace(finished.best, text=answer.text, result=result)
        deltas = (Delta(answer.text),) if answer.text else ()
        told = replace(finished, candidates=(best,), best_index=0, message_id=answer.message_id, replayed=True)
        return (self.outcome.started, *deltas, told)


class _TurnRecord(BaseModel):
    # Fields that a newer replica adds are ignored by an older one.
    model_config = ConfigDict(frozen=True, extra="ignore")

    position: int = Field(ge=0)
    message_count: int = Field(ge=2)
    started: Started
    finished: Finished | None = None


def write_turn(position: int, message_count: int, outcome: Outcome) -> str:
    """Return the JSON of how a turn went; its messages are kept elsewhere."""
    started = replace(outcome.started, prompt_token_ids=())
    finished = None if outcome.finished is None else _without_what_is_kept(outcome.finished)
    record = _TurnRecord(position=position, message_count=message_count, started=started, finished=finished)
    return record.model_dump_json()


def read_turn(value: bytes, messages: Sequence[Message]) -> KeptTurn:
    """Return the turn that `write_turn` wrote, among a conversation's messages; raise `ValueError` for what is none."""
    record = _TurnRecord.model_validate_json(value)
    end = record.position + record.message_count
    if end > len(messages):
        raise ValueError("the turn's messages are missing")
    own = tuple(messages[record.position : end])
    return KeptTurn(record.position, own, end == len(messages), Outcome(record.started, record.finished))


def _without_what_is_kept(finished: Finished) -> Finished:
    """Return what a message does not say of its turn, without what is for this process only."""
    result = replace(finished.best.result, tool_calls=())
    best = Candidate("", result, finished.best.step_scores, finished.best.score)
    return replace(
        finished,
        generated=replace(finished.generated, candidates=(), transfers=(), replica=""),
        candidates=(best,),
        best_index=0,
        receipts=tuple(map(_without_handle, finished.receipts)),
        message_id="",
    )


def _without_handle(receipt: MediaReceipt) -> MediaReceipt:
    # The handle's message is the vision service's own, signed for a while; a receipt does not show it.
    encoded = receipt.encoded
    return replace(receipt, encoded=replace(encoded, handle=replace(encoded.handle, message=b"")))


def _said(message: Message) -> tuple[object, ...]:
    return message.role, message.parts
