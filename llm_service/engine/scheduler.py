"""Decides what each step computes: every running sequence's next token, and prompts in the room that is left."""

from collections.abc import Callable
from dataclasses import dataclass

from llm_service.engine.block_manager import BlockManager
from llm_service.engine.pace import Pace
from llm_service.engine.prefix import PrefixKeys
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
    """Prefix reuse, chunked prefill, preemption by recompute. Model thread only.

    Only running sequences have blocks. Prompts are read in the order in which they would be finished if each had the
    machine to itself: a short one that comes soon after a long one is not held up by it, and none waits for ever.

    `copy(source, target)` copies a block of the cache at once. `want(sequence, placeholders)` is told when a sequence
    needs embeddings that it has not; it then waits while it `is_fetching`.
    """

    def __init__(
        self,
        blocks: BlockManager,
        keys: PrefixKeys,
        pace: Pace,
        max_sequences: int,
        copy: Callable[[int, int], None],
        want: Callable[[Sequence, tuple[int, ...]], object],
    ) -> None:
        self._blocks = blocks
        self._keys = keys
        self._pace = pace
        self._max_sequences = max_sequences
        self._copy = copy
        self._want = want
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []  # in order of arrival
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        return bool(self.running) or any(not seq.is_fetching for seq in self.waiting)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. The caller has checked that it fits into the cache when it is alone."""
        self.waiting.append(seq)
        self._fetch_for(seq, len(self._found(seq)))

    def fork(self, leader: Sequence) -> None:
        """Let the candidates run that waited for `leader` to read their prompt; those without room wait again."""
        place = self.running.index(leader) + 1
        forks, leader.forks = leader.forks, []
        for index, seq in enumerate(forks):
            if len(self.running) >= self._max_sequences or not self._take_prompt(seq, leader):
                self.waiting += forks[index:]
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
        for seq in [seq for seq in self.running if seq.is_decoding]:
            if seq in self.running:  # not preempted by an earlier turn of this loop
                self._schedule(seq, 1, batch)
        room, is_full = self._pace.room(len(batch)), False
        for seq in self._prompts():
            if room <= 0:
                break
            if seq not in self.running:
                if is_full or seq.is_fetching:
                    continue
                if not self._admit(seq):
                    # What comes behind it does not take the room that it waits for.
                    is_full = not seq.is_fetching
                    continue
            room -= self._schedule(seq, min(seq.num_pending, room), batch)
        return batch

    def tokens_alone(self, seq: Sequence) -> int:
        """Return how many tokens a waiting sequence would have to read if it were admitted now."""
        return seq.num_pending - self._blocks.block_size * len(self._found(seq))

    def tokens_until(self, seq: Sequence) -> int:
        """Return how many tokens of prompts are read until this waiting sequence's own are read too."""
        rank = self._rank(seq)
        others = (other for other in (*self.running, *self.waiting) if other is not seq)
        return self.tokens_alone(seq) + sum(other.num_pending for other in others if self._rank(other) <= rank)

    def computed(self, seq: Sequence, count: int) -> None:
        """Note that the next `count` tokens are in the cache; blocks that became full can be found from now on."""
        size = self._blocks.block_size
        before, seq.num_computed = seq.num_computed // size, seq.num_computed + count
        after = seq.num_computed // size
        if after > before:
            keys = self._keys.extend(seq, after)
            for index in range(before, after):
                self._blocks.publish(seq.block_table[index], keys[index])

    def _prompts(self) -> list[Sequence]:
        """Return the sequences that have a prompt to read and may, the next first."""
        prompts = [seq for seq in self.running if not seq.is_decoding]
        if len(self.running) < self._max_sequences:
            prompts += self.waiting
        return sorted(prompts, key=self._rank)

    def _rank(self, seq: Sequence) -> tuple[int, bool, float]:
        """Return what orders prompts: preempted ones, whose streams stand still, come before all others."""
        finish = seq.arrival_time + self._pace.seconds_for(seq.num_pending)
        return seq.request.priority, seq.first_token_time is None, finish

    def _schedule(self, seq: Sequence, count: int, batch: list[ScheduledTokens]) -> int:
        """Put the sequence's next tokens into the batch, preempting others for them; return how many were put."""
        while not self._blocks.grow(seq, seq.num_computed + count):
            victim = max(reversed(self.running), key=lambda other: other.request.priority)
            self._preempt(victim, batch)
            if victim is seq:
                return 0
        batch.append(ScheduledTokens(seq, count))
        return count

    def _admit(self, seq: Sequence) -> bool:
        """Start a waiting sequence, if there is room for all its tokens and one more and its embeddings are there."""
        if len(self.running) >= self._max_sequences:
            return False
        if self.running and self._num_claimed() + 1 + len(seq.forks) > self._max_sequences:
            return False
        donor = self._donor(seq)
        if not (self._take_prompt(seq, donor) if donor else self._start(seq)):
            return False
        self.waiting.remove(seq)
        self.running.append(seq)
        return True

    def _start(self, seq: Sequence) -> bool:
        found = self._found(seq)
        if self._fetch_for(seq, len(found)) or not self._blocks.start(seq, found, len(seq.token_ids) + 1):
            return False
        seq.num_computed = len(found) * self._blocks.block_size
        if seq.num_cached is None:
            seq.num_cached = seq.num_computed
        return True

    def _found(self, seq: Sequence) -> list[int]:
        """Return the blocks in the cache that hold the sequence's first tokens."""
        num_blocks = seq.num_reusable // self._blocks.block_size
        return self._blocks.find(self._keys.extend(seq, num_blocks))

    def _fetch_for(self, seq: Sequence, num_found: int) -> bool:
        """Ask for what the sequence lacks if so many of its blocks are in the cache; return whether that was needed."""
        num_computed = num_found * self._blocks.block_size
        if not seq.lacks(num_computed):
            return False
        seq.drop_embeddings()
        seq.is_fetching = True
        self._want(seq, seq.lacks(num_computed))
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
        self.waiting.insert(0, victim)
