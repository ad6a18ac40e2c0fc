"""The heart of the gateway: one turn from the request to the last event."""

import asyncio
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Protocol

import structlog

from gateway.admission import Admission
from gateway.content import Medium, Message, Role, TextPart, ToolCall
from gateway.conversations import MAX_KEPT_MESSAGES, ConversationStore, Lease
from gateway.dialogue import Dialogue, Limits, check_continuation, check_dialogue
from gateway.encoder import MediaEncoder
from gateway.events import (
    Candidate,
    CandidateResult,
    ChatEvent,
    ChatRequest,
    ChatTimings,
    ContextOverflow,
    Delta,
    Encoded,
    Finished,
    FinishReason,
    Generated,
    GenerateEvent,
    GenerateRequest,
    MediaReceipt,
    Started,
    TokenUsage,
    Transfer,
)
from gateway.kept_turn import KeptTurn, Outcome
from gateway.media import MediaLibrary
from gateway.metrics import UNOBSERVED, GatewayMetrics
from gateway.options import check_options, share_tiles
from gateway.outbox import outbox
from gateway.prompt import prompt_of
from gateway.ranking import Ranking, best_of
from shared.errors import (
    EmbeddingIncompatible,
    EmbeddingNotFound,
    InvalidRequest,
    LlmUnavailable,
    ServiceError,
    StoreUnavailable,
    TurnIdReused,
)

log = structlog.get_logger()


class Llm(Protocol):
    """The LLM service."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateEvent, None]:
        """Stream one answer: one `Started`, any number of `Delta`, one `Generated`; closing the stream aborts it.

        It may be resumed by another task than before, so no context that belongs to a task may span a `yield`. Raises
        what the service answers, `LlmUnavailable` when it cannot be reached or is lost before `Generated`.
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
        admission: Admission | None = None,
    ) -> None:
        self._admission = admission or Admission()
        self._llm = llm
        self._encoder = encoder
        self._library = library
        self._conversations = conversations
        self._limits = limits
        self._ranking = ranking or Ranking()
        self._metrics = metrics

    async def answer(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        """Stream one answer: one `Started`, any number of `Delta`, one `Finished`; closing the stream ends the turn.

        A turn that does not reach `Finished` leaves a kept conversation as it was, unless what was said is to be kept.
        One whose store is lost on the way is answered to the end; its `Finished` then has no message id, because the
        turn may not have been kept. A turn that was answered before under its id is told again.
        """
        stopwatch = Stopwatch()
        with self._metrics.turn() as turn:
            check_options(request, self._limits)
            self._ranking.check(request.ranking_method)
            async with self._admission.turn(request) as place, self._opened(request) as lease:
                dialogue = await self._library.identify(self._checked(request, lease))
                earlier = _answered_before(lease, dialogue)
                if earlier is None:
                    answer = Answer(self._llm, self._encoder, request, dialogue, stopwatch)
                    async with self._keeping_partial(request, lease, answer):
                        async with aclosing(answer.events()) as events:
                            async for said in events:
                                yield said
                        place.settle(*answer.used())
                        candidates = await self._ranking.rank(
                            request.ranking_method, answer.dialogue, answer.candidates()
                        )
                    turn.finished = await self._finished(lease, answer, candidates)
                    ending: tuple[ChatEvent, ...] = (turn.finished,)
                else:
                    place.settle(TokenUsage(), {})
                    turn.is_replayed, ending = True, earlier.events()
        _log_turn(turn.finished, bool(request.conversation_id))
        # Only now, with the lease given back, may the client learn that the next turn can come.
        for event in ending:
            yield event

    def _checked(self, request: ChatRequest, lease: Lease | None) -> Dialogue:
        dialogue = _dialogue(request, lease)
        if request.context_overflow is ContextOverflow.DROP_OLDEST_TURNS:
            dialogue = dialogue.within(self._limits)
        check_dialogue(dialogue, self._limits)
        return replace(dialogue, new=share_tiles(dialogue.new, request.max_total_tiles))

    @asynccontextmanager
    async def _opened(self, request: ChatRequest) -> AsyncIterator[Lease | None]:
        """Hold the conversation that the request continues, if it continues one."""
        if not request.conversation_id:
            _check_is_not_named(request)
            yield None
            return
        check_continuation(request.messages)
        if request.system_message is not None:
            raise InvalidRequest("A kept conversation has its system message already.", field="system_message")
        async with self._conversations.lease(request.conversation_id, request.turn_id) as lease:
            if len(lease.messages) >= MAX_KEPT_MESSAGES:
                raise InvalidRequest(f"A conversation keeps {MAX_KEPT_MESSAGES} messages.", field="conversation_id")
            yield lease

    @asynccontextmanager
    async def _keeping_partial(
        self, request: ChatRequest, lease: Lease | None, answer: "Answer"
    ) -> AsyncIterator[None]:
        """Keep what has been said where the turn ends before its answer, if that is wanted."""
        try:
            yield
        except BaseException as error:
            if lease and request.keep_partial_answer and (said := answer.text_so_far):
                partial = Candidate(said, CandidateResult(FinishReason.UNSPECIFIED))
                # Shielded: the turn ends because its caller has left, who may leave once more.
                message_id = await asyncio.shield(self._keep(lease, answer, partial, Outcome(answer.started)))
                log.info("partial_answer_kept", kept=bool(message_id), error=type(error).__name__)
            raise

    async def _finished(self, lease: Lease | None, answer: "Answer", candidates: tuple[Candidate, ...]) -> Finished:
        """Return the last event of an answer, once its turn is stored where it belongs to a kept conversation."""
        best = best_of(candidates)
        message_id = ""
        if lease:
            outcome = Outcome(answer.started, answer.finished(candidates, best))
            message_id = await self._keep(lease, answer, candidates[best], outcome)
        return answer.finished(candidates, best, message_id)

    async def _keep(self, lease: Lease, answer: "Answer", candidate: Candidate, outcome: Outcome) -> str:
        """Store the turn and return the answer's message id; empty where that failed."""
        new = answer.dialogue.new
        # The bytes go first: a stored turn must not name a picture that later turns cannot find.
        media = [medium for message in (*lease.messages, *new) for medium in message.media]
        await self._library.keep(media, lease.ttl_s)
        reply = replace(_assistant_message(candidate), cut_off=outcome.finished is None)
        try:
            message_id = await lease.append(*new, reply, outcome=outcome)
        except StoreUnavailable:
            message_id = None
        if message_id is None:
            log.warning("turn_not_kept")
        else:
            await self._conversations.note_use(lease.conversation_id)
        return message_id or ""


class Answer:
    """One answer in the making: the media's embeddings, then the model's words, with one more try where that is safe.

    `generated` is set when `events` has ended. `dialogue` gets shorter where the LLM service leaves turns out.
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
        self._started: Started | None = None
        self._has_encoded_again = False
        self._has_retried = False

    @property
    def started(self) -> Started:
        """How the answer began; once it has."""
        assert self._started is not None
        return self._started

    @property
    def text_so_far(self) -> str:
        """What the first candidate has said."""
        return "".join(self._texts.get(0, ()))

    def used(self) -> tuple[TokenUsage, Mapping[Medium, Encoded]]:
        """Return what the answer took, when `events` has ended."""
        assert self.generated is not None
        return self.generated.usage, self._encoded

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

    def finished(self, candidates: tuple[Candidate, ...], best: int, message_id: str = "") -> Finished:
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
            prompt,
            self._request.config,
            self._request.return_token_ids,
            self._request.in_background,
            self._request.conversation_id,
            self._request.context_overflow,
        )
        async with aclosing(outbox(self._llm.generate(request))) as events:
            async for event in events:
                if isinstance(event, Generated):
                    self.generated = event
                elif isinstance(event, Delta):
                    yield self._noted(event)
                elif not self._begun(event):
                    yield self.started
        if self.generated is None:
            raise LlmUnavailable("The LLM service broke the answer off.")

    def _noted(self, delta: Delta) -> Delta:
        self._stopwatch.note_delta()
        self._texts[delta.candidate_index].append(delta.text)
        return delta

    def _begun(self, event: Started) -> bool:
        """Note the beginning of an attempt; return whether the client has seen one before."""
        is_known = self._started is not None
        self.dialogue = self.dialogue.without_oldest_turns(event.dropped_turns)
        self._started = replace(event, dropped_turns=self.dialogue.dropped_turns)
        if self.dialogue.dropped_turns:
            log.info("oldest_turns_left_out", turns=self.dialogue.dropped_turns)
        return is_known

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


def _check_is_not_named(request: ChatRequest) -> None:
    """Raise `InvalidRequest` for what only a turn of a kept conversation can have."""
    if request.turn_id:
        raise InvalidRequest("Only a turn of a kept conversation has an id.", field="turn_id")
    if request.keep_partial_answer:
        raise InvalidRequest("Only a kept conversation keeps partial answers.", field="keep_partial_answer")


def _answered_before(lease: Lease | None, dialogue: Dialogue) -> KeptTurn | None:
    """Return this turn where it was answered to its end before; raise `TurnIdReused` where its id is another's."""
    earlier = lease.earlier if lease else None
    if earlier is None:
        return None
    if not earlier.asks(dialogue.new):
        raise TurnIdReused("The conversation has another turn of this id.", field="turn_id")
    if not earlier.is_cut_off:
        return earlier
    if not earlier.is_last:
        raise TurnIdReused("This turn was cut off, and the conversation has gone on since.", field="turn_id")
    return None


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


def _log_turn(finished: Finished | None, in_conversation: bool) -> None:
    if finished is None:
        log.info("turn_replayed")
        return
    usage, timings = finished.generated.usage, finished.timings
    first_token_s = timings.time_to_first_token_s
    transfers = [receipt.transfer for receipt in finished.receipts if receipt.transfer]
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
        tiles=[receipt.encoded.handle.tile_count for receipt in finished.receipts],
        coalesced=sum(receipt.encoded.coalesced for receipt in finished.receipts),
        encode_ms=[_ms(receipt.encoded.encode_s) for receipt in finished.receipts],
        transfer_tiers=[transfer.cache_tier.value for transfer in transfers],
        transfer_bytes=sum(transfer.size_bytes for transfer in transfers),
        media_ms=_ms(timings.media_s),
        queue_ms=_ms(finished.generated.queue_s),
        prefill_ms=_ms(finished.generated.prefill_s),
        ttft_ms=None if first_token_s is None else _ms(first_token_s),
        tokens_per_s=round(finished.generated.output_tokens_per_s, 1),
        total_ms=_ms(timings.total_s),
        llm_replica=finished.generated.replica,
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 1)
