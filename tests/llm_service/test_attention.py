"""The attention of each device sees what the plain one sees, wherever in the cache a sequence lies."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_service.model import cpu_attention
from llm_service.model.attention import AttentionBackend, BatchLayout, KVCache, Span
from llm_service.model.backends import attention_for
from llm_service.model.config import DecoderConfig, RopeConfig
from llm_service.model.cpu_attention import CpuAttention, can_attend
from llm_service.model.plain_attention import PlainAttention

CPU = torch.device("cpu")
BLOCK = 16
CONFIG = DecoderConfig(
    hidden_size=48,
    num_layers=1,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=1,
    vocab_size=1,
    norm_eps=1e-6,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    rope=RopeConfig(1e4, "default", 1.0, 1),
)


def layout_of(shapes: Sequence[tuple[int, int]], scattered: bool, seed: int = 0) -> tuple[BatchLayout, int]:
    """Return the layout of sequences given as (tokens in the batch, length), and how many blocks it needs."""
    counts = [-(-length // BLOCK) for _, length in shapes]
    order = torch.arange(sum(counts))
    if scattered:
        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed))
    spans, slots, row = [], [], 0
    for (count, length), blocks in zip(shapes, order.split(counts), strict=True):
        spans.append(Span(row, row + count, length, blocks))
        own = torch.arange(length - count, length)
        slots.append(blocks[own // BLOCK] * BLOCK + own % BLOCK)
        row += count
    return BatchLayout(tuple(spans), torch.cat(slots)), sum(counts)


def attended(
    backend: AttentionBackend, layout: BatchLayout, num_blocks: int, dtype: torch.dtype, unused: float = 0.0
) -> torch.Tensor:
    """Return what a backend makes of random numbers; slots that no sequence has hold `unused`."""
    cache = KVCache(CONFIG, num_blocks, BLOCK, dtype, CPU)
    rows = cache.layer(0).rows
    rows.fill_(unused)
    generator = torch.Generator().manual_seed(1)
    for span in layout.spans:
        slots = (span.blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[: span.length]
        rows[slots] = torch.randn(span.length, rows.shape[1], generator=generator).to(dtype)
    qkv = torch.randn(len(layout.slots), sum(CONFIG.qkv_rows), generator=generator).to(dtype)
    with torch.inference_mode():
        return backend(CONFIG, cache, layout).attend(0, qkv)


single = st.integers(1, 900).map(lambda length: (1, length))
chunk = st.tuples(st.integers(2, 40), st.integers(0, 300)).map(lambda pair: (pair[0], sum(pair)))


@settings(max_examples=40, deadline=None)
@given(shapes=st.lists(single | chunk, min_size=1, max_size=8), scattered=st.booleans())
def test_any_batch_is_attended_to_as_by_the_plain_one(shapes: list[tuple[int, int]], scattered: bool) -> None:
    layout, num_blocks = layout_of(shapes, scattered)
    expected = attended(PlainAttention, layout, num_blocks, torch.float32)
    found = attended(CpuAttention, layout, num_blocks, torch.float32)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scattered", [False, True])
def test_in_16_bits_it_is_as_near_to_float32_as_the_plain_one(scattered: bool) -> None:
    layout, num_blocks = layout_of([(1, 300), (1, 310), (1, 40), (1, 900), (30, 30), (20, 260)], scattered)
    exact = attended(PlainAttention, layout, num_blocks, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        plain = attended(PlainAttention, layout, num_blocks, dtype).float()
        found = attended(CpuAttention, layout, num_blocks, dtype).float()
        assert (found - exact).abs().mean() < 1.1 * (plain - exact).abs().mean()


@pytest.mark.parametrize("backend", [CpuAttention, PlainAttention])
@pytest.mark.parametrize("scattered", [False, True])
def test_what_is_not_a_sequences_own_never_reaches_it(backend: AttentionBackend, scattered: bool) -> None:
    layout, num_blocks = layout_of([(1, 3), (1, 37), (1, 20), (5, 21), (7, 7)], scattered)
    found = attended(backend, layout, num_blocks, torch.float32, unused=torch.nan)
    torch.testing.assert_close(found, attended(backend, layout, num_blocks, torch.float32), atol=1e-6, rtol=1e-6)


def test_a_sequence_without_numbers_leaves_its_neighbours_as_they_are() -> None:
    layout, num_blocks = layout_of([(1, 30), (1, 33), (1, 40)], scattered=True)
    cache = KVCache(CONFIG, num_blocks, BLOCK, torch.float32, CPU)
    cache.layer(0).rows.fill_(0.5)
    cache.layer(0).rows[layout.spans[1].blocks[0] * BLOCK] = torch.nan
    found = CpuAttention(CONFIG, cache, layout).attend(0, torch.ones(3, sum(CONFIG.qkv_rows)))
    assert found.isnan().any(dim=1).tolist() == [False, True, False]


def test_a_token_that_is_stored_is_read_back_from_its_slot() -> None:
    cache = KVCache(CONFIG, 3, BLOCK, torch.float32, CPU)
    states = torch.arange(2 * 2 * 2 * 8.0).view(2, 32)  # two tokens
    cache.write(0, torch.tensor([17, 18]), states)
    keys, values = cache.read(0, Span(0, 1, 3, torch.tensor([1])))
    assert torch.equal(keys[1:].flatten(1), states[:, :16])
    assert torch.equal(values[1:].flatten(1), states[:, 16:])
    cache.copy_block(1, 2)
    assert torch.equal(cache.read(0, Span(0, 1, 3, torch.tensor([2])))[0][1:], keys[1:])


def test_a_cpu_gets_its_own_attention_and_other_devices_the_plain_one() -> None:
    assert attention_for(CPU, torch.float32, BLOCK) is CpuAttention
    assert attention_for(torch.device("cuda"), torch.bfloat16, BLOCK) is PlainAttention


@pytest.mark.parametrize("refusal", [AttributeError, RuntimeError, NotImplementedError, TypeError])
def test_a_torch_without_the_operator_attends_plainly(
    refusal: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> object:
        raise refusal

    monkeypatch.setattr(cpu_attention, "_operator", missing)
    can_attend.cache_clear()
    try:
        assert attention_for(CPU, torch.float32, BLOCK) is PlainAttention
    finally:
        can_attend.cache_clear()
