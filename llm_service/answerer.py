"""From a dialogue to a streamed answer: prompt, embeddings, engine, text. The heart of the LLM service."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

import structlog
import torch

from llm_service.embeddings import EmbeddingReader, FetchedEmbedding
from llm_service.engine.beam_search import beam_search
from llm_service.engine.engine import Engine
from llm_service.engine.sequence import EngineRequest, FinishReason, SamplingParams, TokenOutput
from llm_service.prompt.dialogue import Dialogue, EmbeddingRef
from llm_service.prompt.splice import PromptTokens, splice
from llm_service.prompt.template import Template
from llm_service.prompt.text_stream import TextStream
from llm_service.prompt.tokenizer import Tokenizer
from shared.errors import EmbeddingIncompatible, PromptTooLong
from shared.tensors import tensor_of

log = structlog.get_logger()
_INLINE_CHARACTERS = 8_192  # what is tokenized on the event loop; longer prompts go to a thread


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How an answer is decoded, beyond the sampling of single tokens."""

    sampling: SamplingParams
    stop_sequences: tuple[str, ...] = ()
    num_beams: int = 1


@dataclass(frozen=True, slots=True)
class Started:
    """The prompt was accepted."""

    prompt: PromptTokens


@dataclass(frozen=True, slots=True)
class Delta:
    """Text that became certain, and the ids behind it."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete. Durations in seconds; `transfers` in the order of the prompt's placeholders."""

    reason: FinishReason
    num_output_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float
    transfers: tuple[FetchedEmbedding, ...] = ()


Event = Started | Delta | Finished


@dataclass(frozen=True, slots=True)
class LanguageModelFacts:
    """What the answerer has to know of the model: its name, its shape, and which tokens end an answer."""

    name: str
    hidden_size: int
    tokens_per_tile: int
    dtype: torch.dtype
    stop_token_ids: frozenset[int]


class Answerer:
    """Answers dialogues. Safe to use from any task of one event loop."""

    def __init__(
        self,
        facts: LanguageModelFacts,
        template: Template,
        tokenizer: Tokenizer,
        reader: EmbeddingReader,
        engine: Engine,
    ) -> None:
        self.facts = facts
        self._template = template
        self._tokenizer = tokenizer
        self._reader = reader
        self._engine = engine

    async def tokenize(self, dialogue: Dialogue) -> PromptTokens:
        """Return the prompt's tokens; raise `EmbeddingIncompatible` for a handle of another model."""
        pieces = self._template.render(dialogue)
        size = sum(len(getattr(piece, "text", "")) for piece in pieces)
        for ref in (getattr(piece, "ref", None) for piece in pieces):
            if ref is not None:
                self._check(ref)
        if size <= _INLINE_CHARACTERS:
            return splice(pieces, self._tokenizer)
        return await asyncio.to_thread(splice, pieces, self._tokenizer)

    async def answer(self, dialogue: Dialogue, options: GenerationOptions) -> AsyncGenerator[Event]:
        """Yield one `Started`, any number of `Delta`, one `Finished`. Closing the iterator aborts the answer."""
        prompt = await self.tokenize(dialogue)
        self._check_length(prompt)
        fetched = await self._fetch(prompt)
        request = EngineRequest(prompt, self._tensors(fetched), options.sampling)
        yield Started(prompt)
        events = self._decode(request, options) if options.num_beams == 1 else self._search(request, options)
        async with aclosing(events):
            async for event in events:
                yield replace(event, transfers=fetched) if isinstance(event, Finished) else event

    async def _decode(self, request: EngineRequest, options: GenerationOptions) -> AsyncGenerator[Event]:
        text = TextStream(self._tokenizer, (*options.stop_sequences, self._template.stop_token))
        clock = _Clock()
        async with aclosing(self._engine.generate(request)) as outputs:
            async for output in outputs:
                clock.note(output)
                if output.token_id not in request.params.stop_token_ids:
                    yield Delta(text.push(output.token_id), (output.token_id,))
                else:
                    yield Delta("", (output.token_id,))
                if text.stopped:
                    break
        if rest := text.finish():
            yield Delta(rest, ())
        yield clock.finished(FinishReason.STOP if text.stopped else output.finish_reason or FinishReason.STOP)

    async def _search(self, request: EngineRequest, options: GenerationOptions) -> AsyncGenerator[Event]:
        clock = _Clock()
        token_ids = await beam_search(self._engine, request, options.num_beams)
        text = TextStream(self._tokenizer, (*options.stop_sequences, self._template.stop_token))
        spoken = [token for token in token_ids if token not in request.params.stop_token_ids]
        whole = "".join(map(text.push, spoken)) + text.finish()
        yield Delta(whole, token_ids)
        ended = text.stopped or len(spoken) < len(token_ids)
        clock.num_tokens = len(token_ids)
        yield clock.finished(FinishReason.STOP if ended else FinishReason.LENGTH)

    async def _fetch(self, prompt: PromptTokens) -> tuple[FetchedEmbedding, ...]:
        reads = [self._reader.read(placeholder.ref) for placeholder in prompt.placeholders]
        return tuple(await asyncio.gather(*reads))

    def _tensors(self, fetched: tuple[FetchedEmbedding, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor_of(entry.embedding).to(self.facts.dtype) for entry in fetched)

    def _check(self, ref: EmbeddingRef) -> None:
        rows = ref.tile_count * self.facts.tokens_per_tile
        if ref.hidden_size != self.facts.hidden_size or ref.token_count != rows:
            raise EmbeddingIncompatible("The embedding was made for another model than this one.")

    def _check_length(self, prompt: PromptTokens) -> None:
        """Refuse before anything is fetched; the engine checks again."""
        if len(prompt.ids) >= self._engine.max_tokens:
            raise PromptTooLong(
                f"The prompt has {len(prompt.ids)} tokens; the context holds {self._engine.max_tokens}.", field="prompt"
            )


class _Clock:
    """Collects the timing of one answer."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._queue_s = self._prefill_s = 0.0
        self._first_token_time: float | None = None
        self.num_tokens = 0

    def note(self, output: TokenOutput) -> None:
        self.num_tokens += 1
        if self._first_token_time is None:
            self._first_token_time = time.monotonic()
            self._queue_s, self._prefill_s = output.queue_s or 0.0, output.prefill_s or 0.0

    def finished(self, reason: FinishReason) -> Finished:
        decode_s = time.monotonic() - (self._first_token_time or self._began)
        return Finished(reason, self.num_tokens, self._queue_s, self._prefill_s, decode_s)
