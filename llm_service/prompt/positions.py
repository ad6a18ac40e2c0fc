"""Variable visual position encoding: what positions a prompt's tokens have when visual tokens lie closer together."""

import math

import numpy as np
from numpy.typing import NDArray

from llm_service.prompt.splice import PromptTokens

ORDINARY_STRIDE = 256  # in 1/256 of a position: every token is one further than the one before


def positions(prompt: PromptTokens, stride: int) -> NDArray[np.float32]:
    """Return the positions of a prompt's tokens, float32 [tokens]; the first is 0.

    A visual token is `stride` / 256 (1 to 256) further than the token before it, any other token 1 further. The first
    token behind visual tokens is one further than the last of them, rounded up. With a stride of 256 the positions are
    0, 1, 2, ... A generated token is one further than the token before it.
    """
    assert 1 <= stride <= ORDINARY_STRIDE
    result = np.arange(len(prompt.ids), dtype=np.float64)
    for start, end in _visual_runs(prompt):
        # `result[start]` is one further than the token before; what is behind the run moves up with its last token.
        last = result[start] - 1 + (end - start) * stride / ORDINARY_STRIDE
        result[start:end] = np.arange(1, end - start + 1) * (stride / ORDINARY_STRIDE) + (result[start] - 1)
        result[end:] = np.arange(1, len(result) - end + 1) + math.ceil(last)
    return result.astype(np.float32)


def _visual_runs(prompt: PromptTokens) -> list[tuple[int, int]]:
    """Return where visual tokens stand, as start and end; embeddings next to one another are one run."""
    runs: list[tuple[int, int]] = []
    for placeholder in prompt.placeholders:
        end = placeholder.start + placeholder.length
        if runs and runs[-1][1] == placeholder.start:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((placeholder.start, end))
    return runs
