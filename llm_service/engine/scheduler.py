"""Decides what each step computes: every running sequence's next token, and prompts in the room that is left."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from llm_service.engine.block_manager import BlockManager
from llm_service.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledTokens:
    """The next `count` tokens of a sequence."""

    seq: Sequence
    count: int

    @property
    def completes(self) -> bool:
        """Whether the step computes everything that is known."""
        return self.count == self.seq.num_pending

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """The sequences that get a new token: none, this one, or at the end of its prompt its forks as well."""
        if not self.completes or self.seq.request.probe is not None:
            return ()
        return (self.seq, *self.seq.forks)


class Scheduler:
    """First come, first served, with chunked prefill and preemption by recompute. Model thread only.

    Only running sequences have blocks. `copy(source, target)` copies a block of the cache at once.
    """

    def __init__(
        self, blocks: BlockManager, max_sequences: int, max_batch_tokens: int, copy: Callable[[int, int], None]
    ) -> None:
        assert max_batch_tokens >= max_sequences
        self._blocks = blocks
        self._max_sequences = max_sequences
        self._max_batch_tokens = max_batch_tokens
        self._copy = copy
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        return bool(self.running or self.waiting)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. The caller has checked that it fits into the cache when it is alone."""
        self.waiting.append(seq)

    def fork(self, leader: Sequence) -> None:
        """Let the candidates run that waited for `leader` to read their prompt; those without room wait again."""
        place = self.running.index(leader) + 1
        forks, leader.forks = leader.forks, []
        for index, seq in enumerate(forks):
            if len(self.running) >= self._max_sequences or not self._take_prompt(seq, leader):
                self.waiting.extendleft(reversed(forks[index:]))
                return
            self.running.insert(place + index, seq)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence that finished, failed or was aborted; free its blocks."""
        if seq in self.running:
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        self._blocks.release(seq)

    def next_batch(self) -> list[ScheduledTokens]:
        """Return what to compute now: single tokens first, so that no prompt holds them up, then prompts in order."""
        batch: list[ScheduledTokens] = []
        for seq in sorted(self.running, key=lambda seq: not seq.is_decoding):
            if seq in self.running:  # not preempted by an earlier turn of this loop
                self._schedule(seq, batch)
        while self._admit(batch):
            self._schedule(self.running[-1], batch)
        return batch

    def _room(self, batch: list[ScheduledTokens]) -> int:
        return self._max_batch_tokens - sum(tokens.count for tokens in batch)

    def _schedule(self, seq: Sequence, batch: list[ScheduledTokens]) -> None:
        count = min(seq.num_pending, self._room(batch))
        if count == 0:
            return
        while not self._blocks.grow(seq, seq.num_computed + count):
            victim = self.running[-1]
            self._preempt(victim, batch)
            if victim is seq:
                return
        batch.append(ScheduledTokens(seq, count))

    def _admit(self, batch: list[ScheduledTokens]) -> bool:
        """Start the first waiting sequence, if there is room for all its tokens and one more."""
        if not self.waiting or len(self.running) >= self._max_sequences or self._room(batch) == 0:
            return False
        seq = self.waiting[0]
        if self.running and self._num_claimed() + 1 + len(seq.forks) > self._max_sequences:
            return False
        donor = self._donor(seq)
        if not (self._take_prompt(seq, donor) if donor else self._blocks.grow(seq, len(seq.token_ids) + 1)):
            return False
        self.running.append(self.waiting.popleft())
        return True

    def _num_claimed(self) -> int:
        """Return how many run or will once their prompt is read."""
        return sum(1 + len(seq.forks) for seq in self.running)

    def _donor(self, seq: Sequence) -> Sequence | None:
        """Return a running sequence that has the whole prompt of this one in the cache."""
        able = (other for other in seq.family if other.block_table and other.num_computed >= seq.num_prompt)
        return next(able, None)

    def _take_prompt(self, seq: Sequence, donor: Sequence) -> bool:
        if not self._blocks.fork(seq, donor, self._copy):
            return False
        seq.num_computed = seq.num_prompt
        return True

    def _preempt(self, victim: Sequence, batch: list[ScheduledTokens]) -> None:
        """Give a sequence's blocks back; it will be computed again, outputs included, when there is room."""
        self.num_preemptions += 1
        self.running.remove(victim)
        self._blocks.release(victim)
        victim.num_computed = 0
        batch[:] = [tokens for tokens in batch if tokens.seq is not victim]
        self.waiting.appendleft(victim)
