"""The native attention of many rows sees what attention by its definition sees, wherever keys and values lie."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.native.library import kernels
from shared.tile_attention import Heads, attend, can_attend

pytestmark = pytest.mark.skipif(kernels() is None, reason="the kernels were not compiled, or this processor has no AMX")
VIT = Heads(16, 16, 64)


def numbers(*shape: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).bfloat16()


def by_definition(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, heads: Heads, *, causal: bool = False
) -> torch.Tensor:
    """Return float32 [rows, heads * size]."""
    q = queries.double().view(len(queries), heads.queries, heads.size).transpose(0, 1)
    k, v = (
        part.double()
        .reshape(len(part), heads.keys, heads.size)
        .transpose(0, 1)
        .repeat_interleave(heads.queries // heads.keys, dim=0)
        for part in (keys, values)
    )
    scores = q @ k.transpose(1, 2) * heads.size**-0.5
    if causal:
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(len(keys) - len(queries))
        scores = scores.masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1).float()


def assert_near(found: torch.Tensor, exact: torch.Tensor) -> None:
    """As near as bfloat16 allows: its weights and its outputs are rounded."""
    scale = exact.abs().mean()
    assert (found.float() - exact).abs().mean() < 0.006 * scale
    assert (found.float() - exact).abs().max() < 0.1 * scale + 0.02 * exact.abs().max()


@settings(max_examples=60, deadline=None)
@given(
    num_queries=st.integers(1, 90),
    earlier=st.integers(0, 2300),
    heads=st.sampled_from([Heads(2, 2, 64), Heads(14, 2, 64), Heads(4, 1, 128), Heads(3, 3, 96), Heads(2, 1, 256)]),
    causal=st.booleans(),
    size=st.sampled_from([0.3, 1.0, 5.0]),
)
def test_any_shape_is_attended_to(num_queries: int, earlier: int, heads: Heads, causal: bool, size: float) -> None:
    num_keys = earlier + num_queries
    queries = numbers(num_queries, heads.queries * heads.size, size=size)
    keys, values = (numbers(num_keys, heads.keys * heads.size, seed=seed, size=size) for seed in (1, 2))
    found = attend(queries, keys, values, heads, causal=causal)
    assert_near(found, by_definition(queries, keys, values, heads, causal=causal))


def test_a_picture_is_as_near_to_float64_as_by_torchs_operator() -> None:
    qkv = numbers(1025, 3 * 1024, size=2.0)
    q, k, v = qkv.chunk(3, dim=-1)
    exact = by_definition(q, k, v, VIT)
    split = (part.reshape(1, 1025, 16, 64).transpose(1, 2) for part in (q, k, v))
    torchs = torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).reshape(1025, 1024)
    found = attend(q, k, v, VIT)
    assert (found.float() - exact).abs().mean() < 1.05 * (torchs.float() - exact).abs().mean()


def test_blocks_may_be_anywhere_and_what_is_in_others_never_counts() -> None:
    heads, block_size, length = Heads(14, 2, 64), 16, 300
    queries = numbers(40, 14 * 64)
    keys_and_values = numbers(length, 2 * 128, seed=1)
    exact = by_definition(queries, *keys_and_values.chunk(2, dim=1), heads, causal=True)
    cache = torch.full((60 * block_size, 2 * 128), torch.nan).bfloat16()
    blocks = torch.randperm(60, generator=torch.Generator().manual_seed(3))[: -(-length // block_size)]
    slots = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()[:length]
    cache[slots] = keys_and_values
    found = attend(
        queries, *cache.chunk(2, dim=1), heads, length=length, blocks=blocks, block_size=block_size, causal=True
    )
    assert_near(found, exact)


def test_chunks_of_a_prompt_see_what_the_whole_prompt_sees() -> None:
    heads = Heads(4, 2, 64)
    queries, keys, values = numbers(200, 256), numbers(200, 128, seed=1), numbers(200, 128, seed=2)
    whole = attend(queries, keys, values, heads, causal=True)
    for start, end in ((0, 70), (70, 71), (71, 200)):
        chunk = attend(queries[start:end], keys[:end], values[:end], heads, causal=True)
        torch.testing.assert_close(chunk, whole[start:end], atol=0.01, rtol=0.02)


def test_the_largest_scores_may_come_late_or_early() -> None:
    # Weights are taken a thousand keys at a time; what was summed up before has to shrink by as much.
    heads = Heads(1, 1, 64)
    queries, values = numbers(33, 64), numbers(3000, 64, seed=2)
    for first, last in ((0.01, 6.0), (6.0, 0.01)):
        keys = (numbers(3000, 64, seed=1).float() * torch.linspace(first, last, 3000)[:, None]).bfloat16()
        assert_near(attend(queries, keys, values, heads), by_definition(queries, keys, values, heads))


def test_numbers_that_are_none_stay_with_the_query_and_the_head_that_have_them() -> None:
    heads = Heads(2, 2, 32)
    queries, keys, values = numbers(40, 64), numbers(40, 64, seed=1), numbers(40, 64, seed=2)
    queries[3, 5] = torch.nan
    found = attend(queries, keys, values, heads)
    assert found[3, :32].isnan().all()
    found[3, :32] = 0
    assert not found.isnan().any()


def test_scores_beyond_float32_are_no_numbers_for_nobody_else() -> None:
    heads = Heads(1, 1, 32)
    queries, keys, values = numbers(20, 32), numbers(20, 32, seed=1), numbers(20, 32, seed=2)
    queries[7] = 3e38
    found = attend(queries, keys, values, heads)
    assert not found[torch.arange(20) != 7].isnan().any()


def test_it_is_the_same_again() -> None:
    q, k, v = numbers(1025, 3 * 1024).chunk(3, dim=-1)
    found = attend(q, k, v, VIT)
    for _ in range(3):
        assert torch.equal(attend(q, k, v, VIT), found)


@pytest.mark.parametrize(
    ("heads", "dtype", "fits"),
    [
        (VIT, torch.bfloat16, True),
        (VIT, torch.float32, False),
        (Heads(4, 4, 80), torch.bfloat16, False),
        (Heads(4, 4, 288), torch.bfloat16, False),
        (Heads(5, 2, 64), torch.bfloat16, False),
    ],
)
def test_other_shapes_and_types_are_left_to_torch(heads: Heads, dtype: torch.dtype, fits: bool) -> None:
    assert can_attend(torch.empty(1, dtype=dtype), heads) == fits
