"""From a dialogue to a streamed answer: prompt, embeddings, engine, text. The heart of the LLM service."""

import asyncio
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace

import structlog
import torch

from llm_service.admission import Admission
from llm_service.embeddings import EmbeddingReader, FetchedEmbedding
from llm_service.engine.beam_search import beam_search
from llm_service.engine.engine import Engine
from llm_service.engine.sequence import EngineRequest, FinishReason, SamplingParams, TokenOutput
from llm_service.prompt.dialogue import Dialogue
from llm_service.prompt.splice import PromptTokens, splice
from llm_service.prompt.template import Template
from llm_service.prompt.text_stream import TextStream
from llm_service.prompt.tokenizer import Tokenizer
from shared.errors import EmbeddingIncompatible, PromptTooLong
from shared.tensors import tensor_of

log = structlog.get_logger()
_INLINE_CHARACTERS = 8_192  # what is tokenized on the event loop; longer prompts go to a thread
_CHARACTERS_PER_TOKEN = 16  # far above what any language needs; text with more cannot fit and is not even tokenized


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
        admission: Admission,
    ) -> None:
        self.facts = facts
        self._template = template
        self._tokenizer = tokenizer
        self._reader = reader
        self._engine = engine
        self._admission = admission
        # One thread: long prompts wait for one another and not for the event loop.
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")

    async def tokenize(self, dialogue: Dialogue) -> PromptTokens:
        """Return the prompt's tokens.

        Raises `EmbeddingIncompatible` for a handle of another model, and `PromptTooLong` where it is plain without
        looking closer that the context cannot hold the prompt.
        """
        self._check(dialogue)
        pieces = self._template.render(dialogue)
        if dialogue.num_characters <= _INLINE_CHARACTERS:
            return splice(pieces, self._tokenizer)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenizing, splice, pieces, self._tokenizer)

    async def answer(self, dialogue: Dialogue, options: GenerationOptions) -> AsyncGenerator[Event]:
        """Yield one `Started`, any number of `Delta`, one `Finished`. Closing the iterator aborts the answer.

        Raises `QueueFull` at once where too many answers are in progress, and what `tokenize` and the engine raise.
        """
        with self._admission.answer():
            prompt = await self.tokenize(dialogue)
            self._check_length(len(prompt.ids))
            async with self._admission.embeddings(self._embedding_bytes(prompt)):
                fetched = await self._fetch(prompt)
                request = EngineRequest(prompt, self._tensors(fetched), options.sampling)
                yield Started(prompt)
                events = self._decode(request, options) if options.num_beams == 1 else self._search(request, options)
                async with aclosing(events):
                    async for event in events:
                        yield replace(event, transfers=fetched) if isinstance(event, Finished) else event

    async def _decode(self, request: EngineRequest, options: GenerationOptions) -> AsyncGenerator[Event]:
        text = self._text_stream(options)
        clock = _Clock()
        async with aclosing(self._engine.generate(request)) as outputs:
            async for output in outputs:
                clock.note(output)
                ends = output.token_id in request.params.stop_token_ids
                yield Delta("" if ends else text.push(output.token_id), (output.token_id,))
                if text.stopped:
                    break
        if rest := text.finish():
            yield Delta(rest, ())
        yield clock.finished(FinishReason.STOP if text.stopped else output.finish_reason or FinishReason.STOP)

    async def _search(self, request: EngineRequest, options: GenerationOptions) -> AsyncGenerator[Event]:
        clock = _Clock()
        token_ids = await beam_search(self._engine, request, options.num_beams)
        text = self._text_stream(options)
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

    def _text_stream(self, options: GenerationOptions) -> TextStream:
        """Return the stream that the answer's text goes through; the model's end token ends it as text, too."""
        ends = (self._template.stop_token,) if options.sampling.stop_token_ids else ()
        return TextStream(self._tokenizer, (*options.stop_sequences, *ends))

    def _embedding_bytes(self, prompt: PromptTokens) -> int:
        distinct = {placeholder.ref.digest: placeholder.length for placeholder in prompt.placeholders}
        return sum(distinct.values()) * self.facts.hidden_size * self.facts.dtype.itemsize

    def _check(self, dialogue: Dialogue) -> None:
        """Refuse what cannot be right or cannot fit, before anything is built for it."""
        for ref in dialogue.embeddings:
            rows = ref.tile_count * self.facts.tokens_per_tile
            if ref.hidden_size != self.facts.hidden_size or ref.token_count != rows:
                raise EmbeddingIncompatible("The embedding was made for another model than this one.")
        self._check_length(sum(ref.token_count for ref in dialogue.embeddings))
        limit = self._engine.max_tokens
        if dialogue.num_characters > limit * _CHARACTERS_PER_TOKEN:
            raise PromptTooLong(
                f"The prompt has {dialogue.num_characters} characters; the context holds {limit} tokens.",
                field="prompt",
            )

    def _check_length(self, num_tokens: int) -> None:
        """Refuse before anything is fetched; the engine checks again."""
        if num_tokens >= self._engine.max_tokens:
            raise PromptTooLong(
                f"The prompt has {num_tokens} tokens; the context holds {self._engine.max_tokens}.", field="prompt"
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
