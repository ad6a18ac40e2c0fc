"""Positions of visual tokens that lie closer together are the research code's; at full stride they are ordinary."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_service.prompt.positions import ORDINARY_STRIDE, positions
from llm_service.prompt.splice import PlaceholderRange, PromptTokens
from tests.golden_cases import GOLDEN
from tests.llm_service.fakes_llm import ref

CASES = json.loads((GOLDEN / "v2pe_positions.json").read_text())


def prompt_of(segments: list[list[Any]]) -> PromptTokens:
    """Text of so many tokens, and pictures of so many tiles between `<img>` and `</img>`."""
    length = 0
    placeholders = []
    for kind, size in segments:
        if kind == "image":
            placeholders.append(PlaceholderRange(length + 1, 256 * size, ref()))
        length += 256 * size + 2 if kind == "image" else size
    return PromptTokens((0,) * length, tuple(placeholders))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["key"])
def test_positions_are_the_research_codes(case: dict[str, Any]) -> None:
    stride = ORDINARY_STRIDE if case["stride"] == "default" else case["stride"]
    found = positions(prompt_of(case["segments"]), stride)
    assert found.dtype == np.float32
    assert np.array_equal(found, np.load(GOLDEN / "v2pe_positions.npz")[case["key"]])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=5), st.integers(0, 4))
def test_at_full_stride_positions_count_tokens(runs: list[tuple[int, int]], rest: int) -> None:
    placeholders = []
    length = 0
    for before, size in runs:
        placeholders.append(PlaceholderRange(length + before, size, ref()))
        length += before + size
    prompt = PromptTokens((0,) * (length + rest), tuple(placeholders))
    assert positions(prompt, ORDINARY_STRIDE).tolist() == list(range(length + rest))


def test_pictures_that_share_one_run_are_spaced_as_one() -> None:
    together = PromptTokens((0,) * 12, (PlaceholderRange(2, 8, ref()),))
    side_by_side = PromptTokens((0,) * 12, (PlaceholderRange(2, 4, ref()), PlaceholderRange(6, 4, ref())))
    assert positions(together, 32).tolist() == positions(side_by_side, 32).tolist()
    assert positions(together, 32).tolist() == [0, 1, *(1 + step / 8 for step in range(1, 9)), 3, 4]
