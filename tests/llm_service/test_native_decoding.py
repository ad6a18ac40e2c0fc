"""What the native kernels make of rows and of the cache is what torch's operators make of them."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_service.model import cpu_attention, row_ops
from llm_service.model.attention import BatchLayout, KVCache, Span
from llm_service.model.config import DecoderConfig
from llm_service.model.cpu_attention import CpuAttention, can_attend_natively
from llm_service.model.plain_attention import PlainAttention
from shared.native.library import kernels
from tests.golden_models import CPU
from tests.llm_service.test_attention import BLOCK, CONFIG, layout_of

pytestmark = pytest.mark.skipif(kernels() is None, reason="the kernels were not compiled, or this processor has no AMX")
WIDE = replace(CONFIG, num_heads=14, num_kv_heads=2, head_dim=64)
# Heads, heads of keys, size of a head: of the released models, and what is allowed beside them.
SHAPES = [(14, 2, 64), (28, 4, 128), (40, 8, 128), (16, 8, 128), (32, 32, 96), (5, 1, 32), (16, 1, 160), (3, 3, 64)]


def numbers(*shape: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).bfloat16()


def by_torch(function: Callable[[], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(row_ops, "kernels", lambda: None)
        return function()


def share_of_equals(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=1e-30, rtol=2**-7, equal_nan=True)  # a bfloat16 further at most
    return (found == expected).float().mean().item()


@pytest.mark.parametrize(("rows", "size"), [(1, 896), (3, 70), (16, 4864), (200, 256), (1, 1)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_norms_round_where_torch_rounds(rows: int, size: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = numbers(rows, size, size=scale), numbers(size, seed=1)
    found = row_ops.rms_norm(hidden, weight, 1e-6)
    expected = by_torch(lambda: row_ops.rms_norm(hidden, weight, 1e-6), monkeypatch)
    assert share_of_equals(found, expected) > 0.99


@pytest.mark.parametrize(("rows", "size"), [(1, 4864), (5, 33), (40, 1000)])
@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
def test_activations_round_where_torch_rounds(
    rows: int, size: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = numbers(rows, 2 * size, size=scale)
    found = row_ops.silu_and_multiply(both)
    expected = by_torch(lambda: row_ops.silu_and_multiply(both), monkeypatch)
    assert share_of_equals(found, expected) > 0.99


@pytest.mark.parametrize(("rows", "heads", "head_dim"), [(1, 16, 64), (7, 3, 40), (100, 32, 128), (2, 1, 6)])
def test_rotations_are_torchs_bit_for_bit(
    rows: int, heads: int, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = numbers(rows, heads * head_dim + 24)
    cos, sin = (numbers(rows, 1, 2, head_dim // 2, seed=seed) for seed in (1, 2))

    def rotated() -> torch.Tensor:
        states = wide.clone()
        row_ops.rotate_(states[:, : heads * head_dim], cos, sin)
        return states

    assert torch.equal(rotated(), by_torch(rotated, monkeypatch))


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_none_stay_in_their_row(odd: float, monkeypatch: pytest.MonkeyPatch) -> None:
    both = numbers(3, 128)
    both[1, 5] = odd
    for function in (row_ops.silu_and_multiply, lambda rows: row_ops.rms_norm(rows, numbers(128), 1e-6)):
        found, expected = function(both), by_torch(lambda made=function: made(both), monkeypatch)
        assert torch.equal(found.isnan(), expected.isnan())
        assert not found[[0, 2]].isnan().any()


def test_rows_that_lie_apart_and_other_types_are_right_too(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, weight = numbers(4, 300), numbers(100)
    part = wide[:, 100:200]
    assert torch.equal(row_ops.rms_norm(part, weight, 1e-6), row_ops.rms_norm(part.contiguous(), weight, 1e-6))
    assert torch.equal(row_ops.silu_and_multiply(part), by_torch(lambda: row_ops.silu_and_multiply(part), monkeypatch))
    for dtype in (torch.float32, torch.float16):
        assert row_ops.rms_norm(part.to(dtype), weight.to(dtype), 1e-6).dtype == dtype


def attended(
    backend: type[CpuAttention] | type[PlainAttention],
    config: DecoderConfig,
    layout: BatchLayout,
    num_blocks: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    size: float = 1.0,
    unused: float = 0.0,
) -> torch.Tensor:
    """Return what a backend makes of bfloat16 numbers of this size; slots that no sequence has hold `unused`."""
    cache = KVCache(config, num_blocks, BLOCK, dtype, CPU)
    rows = cache.layer(0).rows
    rows.fill_(unused)
    for index, span in enumerate(layout.spans):
        slots = (span.blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[: span.length]
        rows[slots] = numbers(span.length, rows.shape[1], seed=index, size=size).to(dtype)
    qkv = numbers(len(layout.slots), sum(config.qkv_rows), seed=99, size=size).to(dtype)
    return backend(config, cache, layout).attend(0, qkv)


def test_the_kernel_is_what_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, num_blocks = layout_of([(1, 40), (1, 3)], scattered=True)

    def refuse(*_: object) -> object:
        raise AssertionError("torch's operator was called")

    monkeypatch.setattr(cpu_attention, "_flash", refuse)
    attended(CpuAttention, WIDE, layout, num_blocks)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_single_tokens_see_all_that_is_their_sequences(heads: int, kv_heads: int, head_dim: int) -> None:
    config = replace(CONFIG, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    layout, num_blocks = layout_of([(1, 1), (1, 16), (1, 17), (1, 300), (1, 6000)], scattered=True)
    exact = attended(PlainAttention, config, layout, num_blocks, torch.float32)
    found = attended(CpuAttention, config, layout, num_blocks).float()
    torch.testing.assert_close(found, exact, atol=0.01, rtol=0.01)
    plain = attended(PlainAttention, config, layout, num_blocks).float()
    assert (found - exact).abs().mean() < 1.05 * (plain - exact).abs().mean()


single = st.integers(1, 400).map(lambda length: (1, length))
chunk = st.tuples(st.integers(2, 40), st.integers(0, 100)).map(lambda pair: (pair[0], sum(pair)))


@settings(max_examples=30, deadline=None)
@given(shapes=st.lists(single | chunk, min_size=1, max_size=6), scattered=st.booleans(), size=st.sampled_from([1, 9]))
def test_beside_chunks_of_prompts_too(shapes: list[tuple[int, int]], scattered: bool, size: float) -> None:
    layout, num_blocks = layout_of(shapes, scattered)
    exact = attended(PlainAttention, WIDE, layout, num_blocks, torch.float32, size=size)
    found = attended(CpuAttention, WIDE, layout, num_blocks, size=size, unused=torch.nan).float()
    torch.testing.assert_close(found, exact, atol=0.02 * size, rtol=0.02)


def test_a_sequences_numbers_do_not_depend_on_its_neighbours() -> None:
    lengths: Sequence[int] = (5, 64, 333, 18)
    layout, num_blocks = layout_of([(1, length) for length in lengths], scattered=True)
    together = attended(CpuAttention, WIDE, layout, num_blocks)
    cache = KVCache(WIDE, num_blocks, BLOCK, torch.bfloat16, CPU)
    qkv = numbers(len(lengths), sum(WIDE.qkv_rows), seed=99)
    for index, span in enumerate(layout.spans):
        slots = (span.blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[: span.length]
        cache.layer(0).rows[slots] = numbers(span.length, 256, seed=index)
        alone = BatchLayout((Span(0, 1, span.length, span.blocks),), layout.slots[index : index + 1])
        assert torch.equal(CpuAttention(WIDE, cache, alone).attend(0, qkv[index : index + 1])[0], together[index])


def test_a_sequence_without_numbers_leaves_its_neighbours_as_they_are() -> None:
    layout, num_blocks = layout_of([(1, 30), (1, 33), (1, 40)], scattered=True)
    cache = KVCache(WIDE, num_blocks, BLOCK, torch.bfloat16, CPU)
    cache.layer(0).rows.fill_(0.5)
    cache.layer(0).rows[layout.spans[1].blocks[0] * BLOCK] = torch.nan
    found = CpuAttention(WIDE, cache, layout).attend(0, torch.ones(3, sum(WIDE.qkv_rows), dtype=torch.bfloat16))
    assert found.isnan().any(dim=1).tolist() == [False, True, False]


def test_arithmetic_on_tiny_numbers_is_afterwards_as_it_was() -> None:
    layout, num_blocks = layout_of([(1, 40)], scattered=False)
    attended(CpuAttention, WIDE, layout, num_blocks)
    tiny = torch.full((64,), 1e-40)
    assert torch.equal(tiny * 1.0, tiny)


@pytest.mark.parametrize(
    ("change", "block_size", "dtype", "fits"),
    [
        ({}, 16, torch.bfloat16, True),
        ({}, 256, torch.bfloat16, True),
        ({}, 8, torch.bfloat16, False),
        ({}, 16, torch.float32, False),
        ({"head_dim": 80}, 16, torch.bfloat16, False),
        ({"num_heads": 34}, 16, torch.bfloat16, False),
    ],
)
def test_other_shapes_are_left_to_torch(
    change: dict[str, int], block_size: int, dtype: torch.dtype, fits: bool
) -> None:
    config = replace(WIDE, **change)
    assert can_attend_natively(config, KVCache(config, 1, block_size, dtype, CPU)) == fits
