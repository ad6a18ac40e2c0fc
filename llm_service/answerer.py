"""From a dialogue to a streamed answer: prompt, embeddings, engine, text. The heart of the LLM service."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeVar

import structlog
import torch

from llm_service.admission import Admission
from llm_service.candidate import Candidate, CandidateResult, Delta, joined
from llm_service.embeddings import EmbeddingReader
from llm_service.engine.beam_search import beam_search
from llm_service.engine.engine import Engine
from llm_service.engine.sequence import (
    Constraint,
    EngineRequest,
    FinishReason,
    Priority,
    SamplingParams,
    TokenOutput,
)
from llm_service.fetcher import EmbeddingFetcher, Transfer
from llm_service.fitting import Fitted, fitted
from llm_service.metrics import UNOBSERVED, LlmMetrics
from llm_service.prompt.dialogue import Dialogue
from llm_service.prompt.positions import ORDINARY_STRIDE, positions
from llm_service.prompt.splice import PromptTokens
from llm_service.prompt.text_stream import TextStream
from llm_service.prompt.writer import PromptWriter
from llm_service.schema.compiler import SchemaCompiler
from llm_service.scoring import probe_of
from shared import tracing
from shared.errors import EmbeddingIncompatible, PromptTooLong
from shared.rpc.deadline import remaining_s

log = structlog.get_logger()
T = TypeVar("T")
_INLINE_CHARACTERS = 8_192  # what is tokenized on the event loop; longer prompts go to a thread
_CHARACTERS_PER_TOKEN = 16  # far above what any language needs; text with more cannot fit and is not even tokenized


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How an answer is decoded, beyond the sampling of single tokens. `json_schema` empty: any text will do.

    `drops_oldest_turns`: where the context does not hold prompt and answer, the oldest turns are left out.
    """

    sampling: SamplingParams
    stop_sequences: tuple[str, ...] = ()
    num_beams: int = 1
    num_candidates: int = 1
    json_schema: str = ""
    visual_stride: int = ORDINARY_STRIDE
    include_special_tokens: bool = False
    tells_logprobs: bool = False
    priority: Priority = Priority.INTERACTIVE
    drops_oldest_turns: bool = False


@dataclass(frozen=True, slots=True)
class Started:
    """The prompt was accepted, without the oldest `num_dropped` turns."""

    prompt: PromptTokens
    num_dropped: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete: `reason` is the likeliest candidate's, `num_output_tokens` counts all candidates'.

    Durations in seconds. The first `num_cached` tokens of the prompt were in the KV cache; `transfers` are one per
    embedding, in the order of the prompt.
    """

    reason: FinishReason
    num_output_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float
    candidates: tuple[CandidateResult, ...]
    transfers: tuple[Transfer, ...] = ()
    num_cached: int = 0


Event = Started | Delta | Finished


@dataclass(frozen=True, slots=True)
class LanguageModelFacts:
    """What the answerer has to know of the model: its name, its shape, and which tokens end an answer."""

    name: str
    hidden_size: int
    vocabulary_size: int
    tokens_per_tile: int
    dtype: torch.dtype
    stop_token_ids: frozenset[int]


class Answerer:
    """Answers dialogues. Safe to use from any task of one event loop."""

    def __init__(
        self,
        facts: LanguageModelFacts,
        writer: PromptWriter,
        schemas: SchemaCompiler,
        reader: EmbeddingReader,
        engine: Engine,
        admission: Admission,
        metrics: LlmMetrics = UNOBSERVED,
        interval_s: float = 0.0,
    ) -> None:
        """`interval_s` is the least time between two deltas of one answer, but for the last."""
        self.facts = facts
        self._interval_s = interval_s
        self._writer = writer
        self._schemas = schemas
        self._reader = reader
        self._engine = engine
        self._admission = admission
        self._metrics = metrics
        # One thread: long prompts wait for one another and not for the event loop.
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")

    async def tokenize(self, dialogue: Dialogue) -> PromptTokens:
        """Return the prompt's tokens.

        Raises `EmbeddingIncompatible` for a handle of another model, `NotSupportedByModel` for what this model has no
        form for, and `PromptTooLong` where it is plain without looking closer that the context cannot hold the prompt.
        """
        self._check(dialogue)
        return await self._written(self._writer.write, dialogue, dialogue.num_characters)

    async def tokenize_text(self, text: str) -> PromptTokens:
        """Return the tokens of plain text, without a template; raise `PromptTooLong` as `tokenize` does."""
        self._check_characters(len(text), "text")
        return await self._written(self._writer.write_text, text, len(text))

    @property
    def max_tokens(self) -> int:
        """What the context holds, prompt and answer together."""
        return self._engine.max_tokens

    async def answer(self, dialogue: Dialogue, options: GenerationOptions) -> AsyncGenerator[Event]:
        """Yield one `Started`, any number of `Delta`, one `Finished`. Closing the iterator aborts the answer.

        Raises `QueueFull` at once where too many answers are in progress or too many schemas wait to be checked,
        `InvalidJsonSchema`, and what `tokenize` and the engine raise.
        """
        clock = _Clock(self._metrics)
        with self._admission.answer(options.num_candidates):
            left = await self._fitted(dialogue, options)
            dialogue, prompt = left.dialogue, left.prompt
            self._check_length(len(prompt.ids))
            constraint = await self._constraint(options)
            async with self._fetcher(prompt) as fetcher:
                request = EngineRequest(
                    prompt,
                    (),
                    options.sampling,
                    num_candidates=options.num_candidates,
                    constraint=constraint,
                    positions=_positions(prompt, options.visual_stride),
                    fetch=fetcher.fetch,
                    priority=options.priority,
                    deadline=_deadline(),
                    tenant=dialogue.tenant,
                )
                yield Started(prompt, left.num_dropped)
                decode = self._decode if options.num_beams == 1 else self._search
                async with aclosing(decode(request, options, dialogue, clock)) as events:
                    async for event in events:
                        if isinstance(event, Finished):
                            event = replace(event, transfers=fetcher.transfers)
                        else:
                            await fetcher.release()
                        yield event

    async def score(self, dialogue: Dialogue, choices: tuple[str, ...]) -> tuple[tuple[float, ...], ...]:
        """Return how likely each choice is, among them all, as the one word of each of the model's turns.

        The turn to come is the last. Raises `InvalidRequest` where a turn or a choice is no single token, `QueueFull`,
        and what `tokenize` and the engine raise.
        """
        with self._admission.answer():
            prompt = await self.tokenize(dialogue)
            self._check_length(len(prompt.ids))
            probe = probe_of(self._writer, dialogue, prompt, choices)
            async with self._fetcher(prompt) as fetcher:
                params = SamplingParams(max_output_tokens=1)
                request = EngineRequest(
                    prompt,
                    (),
                    params,
                    probe=probe,
                    fetch=fetcher.fetch,
                    deadline=_deadline(),
                    tenant=dialogue.tenant,
                )
                return (await self._engine.probe(request)).probabilities

    async def _decode(
        self, request: EngineRequest, options: GenerationOptions, dialogue: Dialogue, clock: "_Clock"
    ) -> AsyncGenerator[Delta | Finished]:
        candidates = [self._candidate(index, options, dialogue) for index in range(options.num_candidates)]
        ended: set[int] = set()
        clock.begin()
        async with aclosing(self._engine.generate(request, ended)) as outputs:
            async for arrived in outputs:
                said_at = time.monotonic()
                clock.note(arrived[0])
                for index, own in groupby(sorted(arrived, key=_candidate_of), key=_candidate_of):
                    candidate = candidates[index]
                    yield self._told(candidate, own, options)
                    if candidate.has_ended:
                        ended.add(index)
                rest_s = said_at + self._interval_s - time.monotonic()
                if rest_s > 0 and len(ended) < len(candidates):
                    await asyncio.sleep(rest_s)
        yield clock.finished([candidate.result() for candidate in candidates])

    def _told(self, candidate: Candidate, outputs: Iterable[TokenOutput], options: GenerationOptions) -> Delta:
        """Return what tokens add, together, to what their candidate says; those behind its end add nothing."""
        said = []
        for output in outputs:
            said.append(candidate.push(output, is_text=_is_text(output.token_id, options)))
            if candidate.has_ended:
                if rest := candidate.finish():
                    said.append(rest)
                break
        return joined(said)

    async def _search(
        self, request: EngineRequest, options: GenerationOptions, dialogue: Dialogue, clock: "_Clock"
    ) -> AsyncGenerator[Delta | Finished]:
        clock.begin()
        token_ids = await beam_search(self._engine, request, options.num_beams)
        reason = FinishReason.STOP if token_ids[-1] in options.sampling.stop_token_ids else FinishReason.LENGTH
        candidate = self._candidate(0, options, dialogue)
        outputs = [*map(TokenOutput, token_ids[:-1]), TokenOutput(token_ids[-1], reason)]
        yield self._told(candidate, outputs, options)
        yield clock.finished([candidate.result()])

    async def _constraint(self, options: GenerationOptions) -> Constraint | None:
        return await self._schemas.constraint(options.json_schema) if options.json_schema else None

    @asynccontextmanager
    async def _fetcher(self, prompt: PromptTokens) -> AsyncIterator[EmbeddingFetcher]:
        fetcher = EmbeddingFetcher(prompt, self._reader, self._admission, self.facts.dtype, self._metrics)
        try:
            yield fetcher
        finally:
            await fetcher.release()

    def _candidate(self, index: int, options: GenerationOptions, dialogue: Dialogue) -> Candidate:
        return Candidate(
            index,
            self._writer.tokenizer,
            self._text_stream(options, dialogue),
            tells_logprobs=options.tells_logprobs,
            reads_calls=dialogue.uses_tools,
        )

    def _text_stream(self, options: GenerationOptions, dialogue: Dialogue) -> TextStream:
        """Return the stream that an answer's text goes through.

        The model's end token ends it as text, too, unless that text is wanted or may be part of a JSON string.
        """
        is_plain = options.sampling.stop_token_ids and not options.json_schema and not options.include_special_tokens
        return TextStream(
            self._writer.tokenizer,
            (*options.stop_sequences, *((self._writer.template.stop_token,) if is_plain else ())),
            grounding=dialogue.grounding,
            include_special_tokens=options.include_special_tokens,
        )

    async def _written(self, write: Callable[[T], PromptTokens], what: T, num_characters: int) -> PromptTokens:
        if num_characters <= _INLINE_CHARACTERS:
            return write(what)
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, write, what)

    async def _fitted(self, dialogue: Dialogue, options: GenerationOptions) -> Fitted:
        if not options.drops_oldest_turns:
            return Fitted(dialogue, await self.tokenize(dialogue))
        limit = self._engine.max_tokens
        # Whoever asks for a very long answer is not to lose the whole past for it.
        return await fitted(dialogue, self.tokenize, limit - min(options.sampling.max_output_tokens, limit // 2))

    def _check(self, dialogue: Dialogue) -> None:
        """Refuse what cannot be right or cannot fit, before anything is built for it."""
        for ref in set(dialogue.embeddings):
            rows = ref.tile_count * self.facts.tokens_per_tile
            if ref.hidden_size != self.facts.hidden_size or ref.token_count != rows:
                raise EmbeddingIncompatible("The embedding was made for another model than this one.")
        self._check_length(dialogue.num_visual_tokens)
        self._check_characters(dialogue.num_characters, "prompt")

    def _check_characters(self, num_characters: int, field: str) -> None:
        limit = self._engine.max_tokens
        if num_characters > limit * _CHARACTERS_PER_TOKEN:
            raise PromptTooLong(
                f"The prompt has {num_characters} characters; the context holds {limit} tokens.", field=field
            )

    def _check_length(self, num_tokens: int) -> None:
        """Refuse before anything is fetched; the engine checks again."""
        if num_tokens >= self._engine.max_tokens:
            raise PromptTooLong(
                f"The prompt has {num_tokens} tokens; the context holds {self._engine.max_tokens}.", field="prompt"
            )


def _candidate_of(output: TokenOutput) -> int:
    return output.candidate


def _is_text(token_id: int, options: GenerationOptions) -> bool:
    return options.include_special_tokens or token_id not in options.sampling.stop_token_ids


def _deadline() -> float | None:
    """Return when the current call ends, by the monotonic clock."""
    left_s = remaining_s()
    return None if left_s is None else time.monotonic() + left_s


def _positions(prompt: PromptTokens, stride: int) -> torch.Tensor | None:
    return None if stride == ORDINARY_STRIDE else torch.from_numpy(positions(prompt, stride))


class _Clock:
    """Collects the timing of one answer, from the call's arrival on."""

    def __init__(self, metrics: LlmMetrics) -> None:
        self._metrics = metrics
        self._arrived = self._began = time.monotonic()
        self._queue_s = self._prefill_s = 0.0
        self._num_cached = 0
        self._first_token_time: float | None = None

    def begin(self) -> None:
        """Note that the engine is asked."""
        self._began = time.monotonic()

    def note(self, output: TokenOutput) -> None:
        if self._first_token_time is None:
            self._first_token_time = time.monotonic()
            self._queue_s, self._prefill_s = output.queue_s or 0.0, output.prefill_s or 0.0
            self._num_cached = output.num_cached or 0
            self._metrics.note_first_token(self._queue_s, self._prefill_s, self._first_token_time - self._arrived)
            read_at = self._first_token_time - self._prefill_s
            tracing.record("queue", read_at - self._queue_s, read_at, {})
            cached = {"gen_ai.usage.cache_read.input_tokens": self._num_cached}
            tracing.record("prefill", read_at, self._first_token_time, cached)

    def finished(self, candidates: list[CandidateResult]) -> Finished:
        decode_s = time.monotonic() - (self._first_token_time or self._began)
        likeliest = max(candidates, key=lambda candidate: candidate.mean_logprob)
        counts = [candidate.num_output_tokens for candidate in candidates]
        if self._first_token_time is not None:  # there is none in a search over beams
            self._metrics.note_decoded(decode_s, max(counts))
            written = {"gen_ai.usage.output_tokens": sum(counts)}
            tracing.record("decode", self._first_token_time, self._first_token_time + decode_s, written)
        return Finished(
            likeliest.reason,
            sum(counts),
            self._queue_s,
            self._prefill_s,
            decode_s,
            tuple(candidates),
            num_cached=self._num_cached,
        )
