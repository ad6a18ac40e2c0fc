"""The language model's last layer where it is packed: the largest matrix of small models, read in pieces."""

from typing import Final

import torch
from torch import nn

from shared.packed_linear import PackedLinear

_PART_BYTES: Final = 16 << 20


class PackedHead(nn.Module):
    """Logits of hidden states, over a matrix packed in parts, so that packing never takes the matrix's memory twice.

    The matrix comes row by row through `add_rows`. Only when all have come may it be called.
    """

    def __init__(self, hidden_size: int, vocab_size: int, rows: int) -> None:
        """`rows` as for `PackedLinear`."""
        super().__init__()
        self._rows = rows
        self._sizes = _part_sizes(vocab_size, max(1, _PART_BYTES // (2 * hidden_size)))
        self._hidden_size = hidden_size
        self._vocab_size = vocab_size
        self._scratch: torch.Tensor | None = None
        self._num_filled = 0
        self.parts = nn.ModuleList()

    def add_rows(self, rows: torch.Tensor) -> None:
        """Take the matrix's next rows [n, hidden size] over, of any float type."""
        while len(rows):
            size = self._sizes[len(self.parts)]
            if self._scratch is None:
                self._scratch = torch.empty((self._sizes[0], self._hidden_size), dtype=torch.bfloat16)
            count = min(len(rows), size - self._num_filled)
            self._scratch[self._num_filled : self._num_filled + count].copy_(rows[:count])
            self._num_filled += count
            rows = rows[count:]
            if self._num_filled == size:
                self._pack(self._scratch[:size])

    def _pack(self, matrix: torch.Tensor) -> None:
        part = PackedLinear(None, self._rows)
        part.hold(matrix)
        self.parts.append(part)
        self._num_filled = 0
        if len(self.parts) == len(self._sizes):
            self._scratch = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return bfloat16 [rows, vocab] for [rows, hidden size]."""
        logits = torch.empty((len(hidden), self._vocab_size), dtype=torch.bfloat16)
        for part, own in zip(self.parts, torch.split(logits, self._sizes, dim=1), strict=True):
            assert isinstance(part, PackedLinear)
            part.write(hidden, own)
        return logits


def _part_sizes(total: int, most: int) -> list[int]:
    """Return sizes of parts, near to one another, the first the largest: small parts are multiplied by slowly."""
    count = -(-total // most)
    return [total // count + (index < total % count) for index in range(count)]
