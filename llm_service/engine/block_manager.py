"""Hands out the blocks of the KV cache."""

from llm_service.engine.sequence import Sequence


class BlockManager:
    """Knows which blocks are free. Blocks are never shared between sequences."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

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
        seq.block_table += [self._free.pop() for _ in range(missing)]
        return True

    def release(self, seq: Sequence) -> None:
        """Take back all blocks of a sequence."""
        self._free += reversed(seq.block_table)
        seq.block_table = []
