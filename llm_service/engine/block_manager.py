"""Hands out the blocks of the KV cache, and remembers what is in those that nobody reads any more."""

from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Row

import numpy as np

from llm_service.engine.sequence import Sequence


class BlockManager:
    """Knows who reads each block, and by its key what a full one holds. Model thread only, but for the counts.

    Sequences share blocks whose keys are the same; a block that is still written to has one sequence only. A block that
    nobody reads keeps what it holds until it is needed: the one that was read longest ago goes first.

    A sequence's blocks lie side by side where that can be had, so that its keys and values are read without a copy.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._num_readers = [0] * num_blocks
        self._is_empty = np.ones(num_blocks, dtype=bool)  # free, and holds nothing that could be asked for
        self._kept: OrderedDict[int, None] = OrderedDict()  # free, but holds what could; longest ago first
        self._num_empty = num_blocks
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody reads."""
        return self._num_empty + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Those of them that hold what may be asked for again."""
        return len(self._kept)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold `num_tokens`."""
        return -(-num_tokens // self.block_size)

    def find(self, keys: Row[bytes]) -> list[int]:
        """Return the blocks of as many of the keys, from the first on, as are in the cache."""
        found: list[int] = []
        for key in keys:
            if key not in self._block_of:
                break
            found.append(self._block_of[key])
        return found

    def publish(self, block: int, key: bytes) -> None:
        """Make a full block known by its key. Where another is known by it already, nothing changes."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def start(self, seq: Sequence, found: Row[int], num_tokens: int) -> bool:
        """Give a sequence without blocks the ones that were found for it, and more to hold `num_tokens`.

        False, changing nothing, when too few are free.
        """
        assert not seq.block_table
        num_idle = sum(not self._num_readers[block] for block in found)
        if self.blocks_for(num_tokens) - len(found) > self.num_free - num_idle:
            return False
        for block in found:
            self._read(block)
        seq.block_table = list(found)
        return self.grow(seq, num_tokens)

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Make the sequence's blocks hold `num_tokens`; False, changing nothing, when too few are free."""
        missing = self.blocks_for(num_tokens) - len(seq.block_table)
        if missing > self.num_free:
            return False
        if missing > 0:
            seq.block_table += self._take(missing, seq.block_table[-1] + 1 if seq.block_table else 0)
        return True

    def fork(self, seq: Sequence, donor: Sequence, copy: Callable[[int, int], None]) -> bool:
        """Give the sequence, which has no blocks, its prompt as `donor` has it, and room for its other tokens and one.

        Full blocks are shared. The end of the prompt, where both will write behind it in the same block, is copied:
        `copy(source, target)` does it. False, changing nothing, when too few blocks are free.
        """
        num_shared, is_split = seq.num_prompt // self.block_size, seq.num_prompt % self.block_size > 0
        if not self.start(seq, donor.block_table[:num_shared], len(seq.token_ids) + 1):
            return False
        if is_split:
            copy(donor.block_table[num_shared], seq.block_table[num_shared])
        return True

    def release(self, seq: Sequence) -> None:
        """Take back all blocks of a sequence. Of what nobody else reads its end is forgotten first."""
        for block in reversed(seq.block_table):
            self._num_readers[block] -= 1
            if not self._num_readers[block]:
                if block in self._key_of:
                    self._kept[block] = None
                else:
                    self._set_empty(block)
        seq.block_table = []

    def forget(self) -> None:
        """Forget what all blocks hold; sequences go on with theirs, but nobody else finds them."""
        for block in self._kept:
            self._set_empty(block)
        self._kept.clear()
        self._block_of.clear()
        self._key_of.clear()

    def _read(self, block: int) -> None:
        self._num_readers[block] += 1
        self._kept.pop(block, None)

    def _set_empty(self, block: int) -> None:
        self._is_empty[block] = True
        self._num_empty += 1

    def _take(self, count: int, wanted: int) -> list[int]:
        """Return `count` free blocks, beginning with `wanted` and those behind it where they are empty."""
        taken: list[int] = []
        while len(taken) < count:
            if not self._num_empty:
                taken += self._evicted(count - len(taken))
            else:
                if wanted >= self.num_blocks or not self._is_empty[wanted]:
                    wanted = self._new_run(count - len(taken))
                run = self._is_empty[wanted : wanted + count - len(taken)]
                end = wanted + (len(run) if run.all() else int(run.argmin()))
                taken += range(wanted, end)
                self._is_empty[wanted:end] = False
                self._num_empty -= end - wanted
                wanted = end
        for block in taken:
            self._num_readers[block] = 1
        return taken

    def _evicted(self, count: int) -> list[int]:
        """Return the blocks that were read longest ago; what lay side by side comes out side by side."""
        blocks = sorted(self._kept.popitem(last=False)[0] for _ in range(count))
        for block in blocks:
            del self._block_of[self._key_of.pop(block)]
        return blocks

    def _new_run(self, count: int) -> int:
        """Return where to begin: in the largest gap, and in its middle where the block before the gap may yet grow."""
        edges = np.flatnonzero(np.diff(self._is_empty, prepend=False, append=False))
        starts, ends = edges[::2], edges[1::2]
        largest = int((ends - starts).argmax())
        start, end = int(starts[largest]), int(ends[largest])
        return start if start == 0 else max(start, min((start + end) // 2, end - count))
