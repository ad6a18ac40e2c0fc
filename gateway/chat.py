"""The heart of the gateway: one turn from the request to the last event."""

import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Protocol

import structlog

from gateway.content import Medium, Message, Role, TextPart, ToolCall
from gateway.conversations import ConversationStore, Lease
from gateway.dialogue import Dialogue, Limits, check_continuation, check_dialogue
from gateway.encoder import MediaEncoder
from gateway.events import (
    Candidate,
    CandidateResult,
    ChatEvent,
    ChatRequest,
    ChatTimings,
    Delta,
    Encoded,
    Finished,
    Generated,
    GenerateEvent,
    GenerateRequest,
    MediaReceipt,
    Started,
    Transfer,
)
from gateway.media import MediaLibrary
from gateway.metrics import UNOBSERVED, GatewayMetrics
from gateway.options import check_options, share_tiles
from gateway.prompt import prompt_of
from gateway.ranking import Ranking, best_of
from shared.errors import (
    EmbeddingIncompatible,
    EmbeddingNotFound,
    InvalidRequest,
    LlmUnavailable,
    ServiceError,
    StoreUnavailable,
)

log = structlog.get_logger()


class Llm(Protocol):
    """The LLM service."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateEvent, None]:
        """Stream one answer: one `Started`, any number of `Delta`, one `Generated`; closing the stream aborts it.

        Raises what the service answers, `LlmUnavailable` when it cannot be reached or is lost before `Generated`.
        """


class Stopwatch:
    """Measures a turn from the call's arrival, on the monotonic clock."""

    def __init__(self) -> None:
        self._arrival = time.monotonic()
        self._media_s = 0.0
        self._first_token_s: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds since the call arrived."""
        return time.monotonic() - self._arrival

    def note_media(self) -> None:
        """Note that every medium has its embedding."""
        self._media_s = self.elapsed_s

    def note_delta(self) -> None:
        """Note that a delta has come; the first one counts."""
        self._first_token_s = self._first_token_s or self.elapsed_s

    def read(self) -> ChatTimings:
        """Return the times so far."""
        return ChatTimings(self._media_s, self._first_token_s, self.elapsed_s)


class Chat:
    """Answers turns. Safe to share between calls."""

    def __init__(
        self,
        llm: Llm,
        encoder: MediaEncoder,
        library: MediaLibrary,
        conversations: ConversationStore,
        limits: Limits,
        ranking: Ranking | None = None,
        metrics: GatewayMetrics = UNOBSERVED,
    ) -> None:
        self._llm = llm
        self._encoder = encoder
        self._library = library
        self._conversations = conversations
        self._limits = limits
        self._ranking = ranking or Ranking()
        self._metrics = metrics

    async def answer(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        """Stream one answer: one `Started`, any number of `Delta`, one `Finished`; closing the stream ends the turn.

        A turn that does not reach `Finished` leaves a kept conversation as it was. One whose store is lost on the way
        is answered to the end; its `Finished` then has no message id, because the turn may not have been kept.
        """
        stopwatch = Stopwatch()
        with self._metrics.turn() as turn:
            check_options(request, self._limits)
            self._ranking.check(request.ranking_method)
            async with self._opened(request) as lease:
                dialogue = await self._library.identify(self._checked(request, lease))
                answer = Answer(self._llm, self._encoder, request, dialogue, stopwatch)
                async with aclosing(answer.events()) as events:
                    async for event in events:
                        yield event
                candidates = await self._ranking.rank(request.ranking_method, dialogue, answer.candidates())
                best = best_of(candidates)
                message_id = await self._keep(lease, dialogue, candidates[best]) if lease else ""
            # Only now, with the lease given back, may the client learn that the next turn can come.
            turn.finished = finished = answer.finished(candidates, best, message_id)
        _log_turn(finished, bool(request.conversation_id))
        yield finished

    def _checked(self, request: ChatRequest, lease: Lease | None) -> Dialogue:
        dialogue = _dialogue(request, lease)
        check_dialogue(dialogue, self._limits)
        return replace(dialogue, new=share_tiles(dialogue.new, request.max_total_tiles))

    @asynccontextmanager
    async def _opened(self, request: ChatRequest) -> AsyncIterator[Lease | None]:
        """Hold the conversation that the request continues, if it continues one."""
        if not request.conversation_id:
            yield None
            return
        check_continuation(request.messages)
        if request.system_message is not None:
            raise InvalidRequest("A kept conversation has its system message already.", field="system_message")
        async with self._conversations.lease(request.conversation_id) as lease:
            yield lease

    async def _keep(self, lease: Lease, dialogue: Dialogue, best: Candidate) -> str:
        """Store the turn and return the answer's message id; empty where that failed."""
        # The bytes go first: a stored turn must not name a picture that later turns cannot find.
        await self._library.keep(dialogue.media, lease.ttl_s)
        try:
            message_id = await lease.append(*dialogue.new, _assistant_message(best))
        except StoreUnavailable:
            message_id = None
        if message_id is None:
            log.warning("turn_not_kept")
        return message_id or ""


class Answer:
    """One answer in the making: the media's embeddings, then the model's words, with one more try where that is safe.

    `generated` is set when `events` has ended.
    """

    def __init__(
        self, llm: Llm, encoder: MediaEncoder, request: ChatRequest, dialogue: Dialogue, stopwatch: Stopwatch
    ) -> None:
        self.dialogue = dialogue
        self.generated: Generated | None = None
        self._llm = llm
        self._encoder = encoder
        self._request = request
        self._stopwatch = stopwatch
        self._encoded: dict[Medium, Encoded] = {}
        self._texts: defaultdict[int, list[str]] = defaultdict(list)
        self._has_started = False
        self._has_encoded_again = False
        self._has_retried = False

    def candidates(self) -> tuple[Candidate, ...]:
        """Return what the model has said, when `events` has ended; not ranked. Calls of tools get their ids here."""
        assert self.generated is not None
        results = self.generated.candidates or (_only_candidate(self.generated),)
        return tuple(
            Candidate("".join(self._texts[index]), replace(result, tool_calls=_named(result.tool_calls)))
            for index, result in enumerate(results)
        )

    async def events(self) -> AsyncGenerator[Started | Delta, None]:
        """Stream everything but the end."""
        self._encoded = await self._encoder.encode(self.dialogue.placed_media)
        while self.generated is None:
            self._stopwatch.note_media()
            try:
                async with aclosing(self._attempt()) as events:
                    async for event in events:
                        yield event
            except (EmbeddingNotFound, EmbeddingIncompatible, LlmUnavailable) as error:
                await self._prepare_another_attempt(error)

    def finished(self, candidates: tuple[Candidate, ...], best: int, message_id: str) -> Finished:
        """Return the last event of an answer whose `events` have ended."""
        assert self.generated is not None
        receipts = self._receipts(self.generated)
        return Finished(self.generated, self._stopwatch.read(), candidates, best, receipts, message_id)

    def _receipts(self, generated: Generated) -> tuple[MediaReceipt, ...]:
        transfers = list(generated.transfers)
        encoded = [(medium, self._encoded[medium]) for medium in self.dialogue.media]
        return tuple(
            MediaReceipt(medium.digest, each, _take_transfer(transfers, each.handle.digest)) for medium, each in encoded
        )

    async def _attempt(self) -> AsyncGenerator[Started | Delta, None]:
        handles = {medium: encoded.handle for medium, encoded in self._encoded.items()}
        prompt = prompt_of(self.dialogue, handles, self._request.tools)
        request = GenerateRequest(
            prompt, self._request.config, self._request.return_token_ids, self._request.in_background
        )
        async with aclosing(self._llm.generate(request)) as events:
            async for event in events:
                if isinstance(event, Generated):
                    self.generated = event
                elif self._is_news(event):
                    yield event
        if self.generated is None:
            raise LlmUnavailable("The LLM service broke the answer off.")

    def _is_news(self, event: Started | Delta) -> bool:
        """Note the event; return whether the client has not seen its like, as it has a second `Started`."""
        if isinstance(event, Delta):
            self._stopwatch.note_delta()
            self._texts[event.candidate_index].append(event.text)
            return True
        is_first, self._has_started = not self._has_started, True
        return is_first

    async def _prepare_another_attempt(self, error: ServiceError) -> None:
        """Do what makes another attempt worth while, once per cause; raise `error` where none is allowed.

        After a delta none is: the client would read the beginning twice.
        """
        is_lost = isinstance(error, LlmUnavailable)
        if self._texts or (self._has_retried if is_lost else self._has_encoded_again):
            raise error
        log.warning("answer_attempted_again", reason=error.reason)
        if is_lost:
            self._has_retried = True
        else:
            self._has_encoded_again = True
            self._encoded = await self._encoder.encode_again(self.dialogue.placed_media)


def _dialogue(request: ChatRequest, lease: Lease | None) -> Dialogue:
    if lease is None:
        return Dialogue(request.system_message, (), request.messages)
    return Dialogue(lease.system_message, lease.messages, request.messages)


def _assistant_message(candidate: Candidate) -> Message:
    text = (TextPart(candidate.text),) if candidate.text else ()
    return Message(Role.ASSISTANT, (*text, *candidate.result.tool_calls))


def _only_candidate(generated: Generated) -> CandidateResult:
    return CandidateResult(generated.finish_reason, generated.usage.output_tokens)


def _named(calls: tuple[ToolCall, ...]) -> tuple[ToolCall, ...]:
    """Return the calls with an id each; the LLM service knows no dialogue in which one could be unique."""
    return tuple(replace(call, tool_call_id=call.tool_call_id or f"call_{secrets.token_urlsafe(9)}") for call in calls)


def _take_transfer(transfers: list[Transfer], digest: str) -> Transfer | None:
    """Take the first transfer of an embedding out of the list; the last of its kind stays, as it may be for all."""
    same = [transfer for transfer in transfers if transfer.digest == digest]
    if len(same) > 1:
        transfers.remove(same[0])
    return same[0] if same else None


def _log_turn(finished: Finished, in_conversation: bool) -> None:
    usage, timings = finished.generated.usage, finished.timings
    first_token_s = timings.time_to_first_token_s
    log.info(
        "turn_finished",
        finish_reason=finished.best.result.finish_reason.value,
        candidates=len(finished.candidates),
        in_conversation=in_conversation,
        kept=bool(finished.message_id),
        prompt_tokens=usage.prompt_tokens,
        visual_tokens=usage.visual_tokens,
        cached_tokens=usage.cached_tokens,
        output_tokens=usage.output_tokens,
        media=len(finished.receipts),
        cache_tiers=[receipt.encoded.cache_tier.value for receipt in finished.receipts],
        media_ms=_ms(timings.media_s),
        ttft_ms=None if first_token_s is None else _ms(first_token_s),
        total_ms=_ms(timings.total_s),
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 1)
