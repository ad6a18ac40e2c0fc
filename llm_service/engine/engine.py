"""The engine: asyncio outside, one model thread inside. This is the file where the two meet.

The event loop posts commands; the thread takes them between steps, runs steps while there is work, and hands the
outputs of each step back in one call to the loop.
"""

import asyncio
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Protocol

import structlog
import torch

from llm_service.engine.block_manager import BlockManager
from llm_service.engine.model_runner import SampledToken
from llm_service.engine.pace import Pace, StepLimits
from llm_service.engine.prefix import PrefixKeys, RotationOf, always_plain
from llm_service.engine.scheduler import ScheduledTokens, Scheduler
from llm_service.engine.sequence import (
    EngineRequest,
    Failure,
    Output,
    ProbeOutput,
    Sequence,
    TokenOutput,
    Wanted,
    candidates_of,
)
from shared.busy_sign import BusySign
from shared.errors import DeadlineExceeded, InternalError, PromptTooLong, QueueFull, ServiceError
from shared.rpc.deadline import request_id
from shared.stall import Progress

log = structlog.get_logger()
_Delivery = tuple[Sequence, Output]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A moment of the engine, and what it has done until then.

    Prefilled are tokens that were read, those read again after a preemption included; cached, tokens of prompts that
    were in the KV cache and not read; decoded, those generated. Kept blocks are free, but hold what may be asked for.
    """

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_blocks: int
    num_preemptions: int = 0
    num_prefilled_tokens: int = 0
    num_decoded_tokens: int = 0
    num_cached_tokens: int = 0
    num_kept_blocks: int = 0


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """How much the engine takes on: sequences, the size of a step, tokens per sequence."""

    max_sequences: int
    step: StepLimits
    max_tokens: int


class Engine(Protocol):
    """Turns prompts into tokens. Safe to use from any task of one event loop."""

    @property
    def max_tokens(self) -> int:
        """Most tokens that one sequence, prompt and output, may have."""

    def generate(
        self, request: EngineRequest, ended: AbstractSet[int] = frozenset()
    ) -> AsyncGenerator[tuple[TokenOutput, ...]]:
        """Yield the output tokens, each time those that have come. Closing the iterator aborts all candidates.

        A candidate that the caller adds to `ended` between two of these is aborted; the others go on, even if it
        fails meanwhile. Raises `PromptTooLong` where the prompt leaves no room for a token, `DeadlineExceeded` or
        `QueueFull` where its first token cannot come in time, even or only without those ahead of it, `InternalError`
        where the computation of one of the request's own sequences failed, and what its constraint and fetch raise.
        """

    async def probe(self, request: EngineRequest) -> ProbeOutput:
        """Read the prompt and return what the request's probe finds in it; nothing is generated. Raises likewise."""

    def forget(self) -> None:
        """Forget all that is kept for prompts to come, from the next step on."""

    def stats(self) -> EngineStats:
        """Return the state after the last step; from any thread."""


class StepRunner(Protocol):
    """Computes one step; `ModelRunner` is the real one."""

    def step(self, batch: list[ScheduledTokens]) -> list[SampledToken]:
        """Return one token per sequence in the entries' `sampled`, in order; fill in `probed`. May raise anything."""

    def copy_block(self, source: int, target: int) -> None:
        """Copy a block of the KV cache."""


class PagedEngine:
    """The built-in engine: continuous batching over a paged KV cache."""

    def __init__(
        self,
        runner: StepRunner,
        blocks: BlockManager,
        limits: EngineLimits,
        rotation_of: RotationOf = always_plain,
        neighbour: BusySign | None = None,
    ) -> None:
        """While a neighbour says that it is busy, answers go on no faster than the limit of a step demands."""
        assert limits.step.max_tokens >= limits.max_sequences
        self._runner = runner
        self._blocks = blocks
        self._pace = Pace(limits.step)
        keys = PrefixKeys(blocks.block_size, rotation_of)
        self._scheduler = Scheduler(
            blocks, keys, self._pace, limits.max_sequences, runner.copy_block, self._want_embeddings
        )
        self._neighbour, self._longest_step_s = neighbour, limits.step.busy_s
        self._max_tokens = min(limits.max_tokens, blocks.num_blocks * blocks.block_size)
        self._num_prefilled = self._num_decoded = self._num_cached = 0
        self._broken = False
        self._on_broken: Callable[[], object] = lambda: None
        self._commands: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._stopping = False
        self._num_steps, self._is_idle = 0, True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def max_tokens(self) -> int:
        """Most tokens that one sequence may have."""
        return self._max_tokens

    def start(self, on_broken: Callable[[], object] = lambda: None) -> None:
        """Start the model thread; `on_broken` is called on this event loop if the engine fails as a whole."""
        self._loop = asyncio.get_running_loop()
        self._on_broken = on_broken
        self._thread.start()

    def stop(self) -> None:
        """End the model thread after its current step."""
        self._post(lambda: setattr(self, "_stopping", True))
        self._thread.join(timeout=10)

    async def generate(
        self, request: EngineRequest, ended: AbstractSet[int] = frozenset()
    ) -> AsyncGenerator[tuple[TokenOutput, ...]]:
        """Yield the output tokens; see `Engine`."""
        family, outputs = self._submit(request)
        running = dict(enumerate(family))
        try:
            while running:
                arrived = await self._arrived(request, outputs)
                # Not those that were on their way when their candidate was ended.
                tokens = [each for each in arrived if isinstance(each, TokenOutput) and each.candidate in running]
                if tokens:
                    yield tuple(tokens)
                for output in tokens:
                    if output.finish_reason is not None:
                        del running[output.candidate]
                for candidate in ended & running.keys():
                    self._abort(running.pop(candidate))
                for failed in arrived:
                    if isinstance(failed, Failure) and failed.candidate in running:
                        raise failed.error
        finally:
            self._abort(*family)

    async def probe(self, request: EngineRequest) -> ProbeOutput:
        """Return what the request's probe finds; see `Engine`."""
        family, outputs = self._submit(request)
        try:
            while not (arrived := await self._arrived(request, outputs)):
                pass
        finally:
            self._abort(*family)
        (output,) = arrived
        if isinstance(output, Failure):
            raise output.error
        assert isinstance(output, ProbeOutput)
        return output

    def stats(self) -> EngineStats:
        """Return the state after the last step; from any thread."""
        return EngineStats(
            len(self._scheduler.running),
            len(self._scheduler.waiting),
            self._blocks.num_free,
            self._blocks.num_blocks,
            self._scheduler.num_preemptions,
            self._num_prefilled,
            self._num_decoded,
            self._num_cached,
            self._blocks.num_kept,
        )

    def progress(self) -> Progress:
        """Return how far the model thread has come; from any thread. What waits for embeddings is no work of its."""
        return Progress(self._num_steps, not self._is_idle)

    def forget(self) -> None:
        """Forget all that is kept for prompts to come; see `Engine`."""
        self._post(self._blocks.forget)

    def _submit(self, request: EngineRequest) -> tuple[tuple[Sequence, ...], asyncio.Queue[Output]]:
        outputs: asyncio.Queue[Output] = asyncio.Queue()
        family = candidates_of(self._checked(request), outputs.put_nowait, time.monotonic(), request_id())
        self._post(lambda: self._add(family[0]))
        return family, outputs

    async def _arrived(self, request: EngineRequest, outputs: asyncio.Queue[Output]) -> list[Output]:
        """Wait for something; return what there is, having fetched the embeddings that are wanted."""
        arrived = [await outputs.get()]
        while not outputs.empty():
            arrived.append(outputs.get_nowait())
        for output in arrived:
            if isinstance(output, Wanted):
                assert request.fetch is not None
                self._post(partial(_provide, output.seq, await request.fetch(output.placeholders)))
        return [output for output in arrived if not isinstance(output, Wanted)]

    def _abort(self, *family: Sequence) -> None:
        """Forget sequences; nothing, where they have finished."""

        def remove() -> None:
            for seq in family:
                self._scheduler.remove(seq)

        self._post(remove)

    def _checked(self, request: EngineRequest) -> EngineRequest:
        """Return the request with its output limited to what the context leaves, or raise what `generate` says."""
        room = self._max_tokens - len(request.prompt.ids) - len(request.generated)
        if self._broken:
            raise InternalError("The language model has stopped.")
        if room <= 0:
            raise PromptTooLong(
                f"The prompt has {len(request.prompt.ids)} tokens; the context holds {self._max_tokens}.",
                field="prompt",
            )
        max_output_tokens = min(request.params.max_output_tokens, room)
        return replace(request, params=replace(request.params, max_output_tokens=max_output_tokens))

    def _post(self, command: Callable[[], object]) -> None:
        self._commands.put(command)

    # Below: model thread.

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_commands()
                if batch := self._scheduler.next_batch():
                    began = time.monotonic()
                    deliveries = self._compute(batch)
                    self._num_steps += 1
                    self._deliver(deliveries)
                    if self._neighbour is not None and self._neighbour.neighbour_is_busy():
                        self._give_way(batch, began)
        except Exception:
            log.critical("engine_stopped", exc_info=True)
            self._broken = True
            self._call_loop(self._on_broken)
            self._refuse_everything()

    def _add(self, seq: Sequence) -> None:
        """Queue a sequence, unless its first token cannot be there in time, even twice as fast as steps have been."""
        if (deadline := seq.request.deadline) is not None:
            left_s = deadline - time.monotonic()
            if self._pace.seconds_for(self._scheduler.tokens_alone(seq)) > 2 * left_s:
                self._deliver([(seq, Failure(DeadlineExceeded("The prompt cannot be read before the deadline.")))])
                return
            queue_s = self._pace.seconds_for(self._scheduler.tokens_until(seq))
            if queue_s > 2 * left_s:
                full = QueueFull("What waits already takes until after the deadline.", retry_after_s=queue_s)
                self._deliver([(seq, Failure(full))])
                return
        self._scheduler.add(seq)

    def _want_embeddings(self, seq: Sequence, placeholders: tuple[int, ...]) -> None:
        self._deliver([(seq, Wanted(seq, placeholders))])

    def _refuse_everything(self) -> None:
        """Fail what is there and whatever was posted before its sender could know."""
        while not self._stopping:
            self._deliver([self._fail(seq) for seq in (*self._scheduler.running, *self._scheduler.waiting)])
            self._commands.get()()

    def _take_commands(self) -> None:
        """Carry out what was posted; wait for something when there is nothing to compute."""
        if not self._scheduler.has_work:
            self._is_idle = True
            command = self._commands.get()
            self._is_idle = False
            command()
        while not self._commands.empty():
            self._commands.get()()

    def _give_way(self, batch: list[ScheduledTokens], began: float) -> None:
        """Leave the processors to the neighbour for the rest of what a step may take, unless a prompt is being read.

        Whoever waits for it has seen nothing yet.
        """
        rest_s = began + self._longest_step_s - time.monotonic()
        if rest_s > 0 and all(tokens.seq.is_decoding for tokens in batch):
            with suppress(Empty):
                self._commands.get(timeout=rest_s)()

    def _compute(self, batch: list[ScheduledTokens]) -> list[_Delivery]:
        """Run a step. If it fails, run each sequence alone, so that only the one at fault fails."""
        now = time.monotonic()
        for tokens in batch:
            tokens.seq.start_time = tokens.seq.start_time or now
        try:
            with self._neighbour.raised() if self._neighbour else nullcontext():
                sampled = self._runner.step(batch)
            self._pace.note(sum(tokens.count for tokens in batch), time.monotonic() - now)
            return self._advance(batch, sampled)
        except Exception as error:  # whatever a model raises is one sequence's failure
            if len(batch) > 1:
                log.warning("step_failed", error=type(error).__name__, sequences=len(batch))
                return [delivery for tokens in batch for delivery in self._compute([tokens])]
            if isinstance(error, ServiceError):  # what the request asks for, not the model, is at fault
                return [self._fail(batch[0].seq, error)]
            log.exception("sequence_failed", request_id=batch[0].seq.request_id)
            return [self._fail(batch[0].seq)]

    def _advance(self, batch: list[ScheduledTokens], sampled: list[SampledToken]) -> list[_Delivery]:
        chosen = [seq for tokens in batch for seq in tokens.sampled]
        probed = [tokens.seq for tokens in batch if tokens.seq.request.probe and tokens.completes]
        self._num_prefilled += sum(tokens.count for tokens in batch if not tokens.seq.is_answering)
        for tokens in batch:
            self._scheduler.computed(tokens.seq, tokens.count)
        for seq in chosen:
            if seq.forks:
                self._scheduler.fork(seq)
        appended = [self._append(seq, token) for seq, token in zip(chosen, sampled, strict=True)]
        return [*appended, *map(self._probed, probed)]

    def _append(self, seq: Sequence, sampled: SampledToken) -> _Delivery:
        if sampled.token_id is None:
            return self._fail_without_numbers(seq)
        seq.token_ids.append(sampled.token_id)
        self._num_decoded += 1
        if seq.constraint is not None:
            seq.constraint.accept(sampled.token_id)
        reason = seq.finish_reason()
        queue_s = prefill_s = num_cached = None
        if seq.first_token_time is None:
            queue_s, prefill_s = self._first_token_timing(seq)
            seq.drop_embeddings()
            num_cached = seq.num_cached
            self._num_cached += num_cached or 0
        if reason is not None:
            self._scheduler.remove(seq)
        return seq, TokenOutput(
            sampled.token_id,
            reason,
            sampled.top_logprobs,
            queue_s,
            prefill_s,
            sampled.logprob,
            seq.candidate,
            num_cached,
        )

    def _probed(self, seq: Sequence) -> _Delivery:
        assert seq.request.probe is not None
        found = tuple(seq.probed[position] for position in seq.request.probe.positions)
        if not all(math.isfinite(probability) for row in found for probability in row):
            return self._fail_without_numbers(seq)
        self._scheduler.remove(seq)
        return seq, ProbeOutput(found)

    def _fail(self, seq: Sequence, error: ServiceError | None = None) -> _Delivery:
        self._scheduler.remove(seq)
        return seq, Failure(error or InternalError("The language model failed on this request."), seq.candidate)

    def _fail_without_numbers(self, seq: Sequence) -> _Delivery:
        log.error("sequence_failed", request_id=seq.request_id, cause="logits are not numbers")
        return self._fail(seq)

    def _first_token_timing(self, seq: Sequence) -> tuple[float, float]:
        start_time = seq.family[0].start_time
        assert start_time is not None  # the first candidate has read the prompt for all
        seq.first_token_time = time.monotonic()
        return start_time - seq.arrival_time, seq.first_token_time - start_time

    def _deliver(self, deliveries: list[_Delivery]) -> None:
        def put_all() -> None:
            for seq, output in deliveries:
                seq.deliver(output)

        if deliveries:
            self._call_loop(put_all)

    def _call_loop(self, callback: Callable[[], object]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)


def _provide(seq: Sequence, embeddings: Mapping[int, torch.Tensor]) -> None:
    """Give a sequence what it waits for."""
    for index, embedding in embeddings.items():
        seq.embeddings[index] = embedding
    seq.is_fetching = False
