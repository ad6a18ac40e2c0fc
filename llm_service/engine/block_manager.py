"""Hands out the blocks of the KV cache."""

from collections.abc import Callable

from llm_service.engine.sequence import Sequence


class BlockManager:
    """Knows which blocks are free, and how many sequences read each of the others.

    Candidates of one request share the blocks that their prompt fills; a block that is still written to has one
    sequence only.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_readers = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody has."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold `num_tokens`."""
        return -(-num_tokens // self.block_size)

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Make the sequence's blocks hold `num_tokens`; False, changing nothing, when too few are free."""
        missing = self.blocks_for(num_tokens) - len(seq.block_table)
        if missing > len(self._free):
            return False
        seq.block_table += [self._take() for _ in range(missing)]
        return True

    def fork(self, seq: Sequence, donor: Sequence, copy: Callable[[int, int], None]) -> bool:
        """Give the sequence, which has no blocks, its prompt as `donor` has it, and room for its other tokens and one.

        Full blocks are shared. The end of the prompt, where both will write behind it in the same block, is copied:
        `copy(source, target)` does it. False, changing nothing, when too few blocks are free.
        """
        assert not seq.block_table
        num_shared, is_split = seq.num_prompt // self.block_size, seq.num_prompt % self.block_size > 0
        if self.blocks_for(len(seq.token_ids) + 1) - num_shared > len(self._free):
            return False
        seq.block_table = donor.block_table[:num_shared]
        for block in seq.block_table:
            self._num_readers[block] += 1
        self.grow(seq, len(seq.token_ids) + 1)
        if is_split:
            copy(donor.block_table[num_shared], seq.block_table[num_shared])
        return True

    def release(self, seq: Sequence) -> None:
        """Take back all blocks of a sequence that nobody else reads."""
        for block in reversed(seq.block_table):
            self._num_readers[block] -= 1
            if not self._num_readers[block]:
                self._free.append(block)
        seq.block_table = []

    def _take(self) -> int:
        block = self._free.pop()
        self._num_readers[block] = 1
        return block
