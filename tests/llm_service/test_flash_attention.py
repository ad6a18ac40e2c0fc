"""flash-attn is asked for what the plain attention computes. No GPU here: its two entry points are written out."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional

from llm_service.model import flash_attention
from llm_service.model.backends import attention_for
from llm_service.model.flash_attention import FlashAttention, Kernels
from llm_service.model.plain_attention import PlainAttention
from tests.llm_service.test_attention import BLOCK, CONFIG, CPU, attended, layout_of


class WrittenOut:
    """What flash-attn's documentation says that its functions return, sequence by sequence."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def decode(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **options: Any) -> torch.Tensor:
        """queries [sequences, 1, heads, head_dim] over pages; returns the same shape."""
        self.calls.append("decode")
        assert options.pop("causal")
        lengths, tables = options.pop("cache_seqlens"), options.pop("block_table")
        assert not options
        assert lengths.dtype == tables.dtype == torch.int32
        rows = [
            _causal(states, _known(keys, table, length), _known(values, table, length))
            for states, table, length in zip(queries, tables, lengths.tolist(), strict=True)
        ]
        return torch.stack(rows)

    def varlen(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **options: Any) -> torch.Tensor:
        """queries [tokens, heads, head_dim] over pages; returns the same shape."""
        self.calls.append("varlen")
        assert options.pop("causal")
        ends, known_ends = options.pop("cu_seqlens_q"), options.pop("cu_seqlens_k")
        tables = options.pop("block_table")
        assert ends.dtype == known_ends.dtype == tables.dtype == torch.int32
        lengths = known_ends.diff().tolist()
        assert (options.pop("max_seqlen_q"), options.pop("max_seqlen_k")) == (int(ends.diff().max()), max(lengths))
        assert not options
        parts = [
            _causal(states, _known(keys, table, length), _known(values, table, length))
            for states, table, length in zip(queries.split(ends.diff().tolist()), tables, lengths, strict=True)
        ]
        return torch.cat(parts)


def _known(pages: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    assert pages.stride(-1) == 1
    return pages[table[: -(-length // BLOCK)].long()].flatten(0, 1)[:length]


def _causal(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[count, heads, head_dim] over [length, kv_heads, head_dim]: the last query sees all."""
    assert queries.stride(-1) == 1
    count, length = len(queries), len(keys)
    mask = torch.ones(count, length, dtype=torch.bool).tril(length - count)
    states = (part.transpose(0, 1)[None] for part in (queries, keys, values))
    return functional.scaled_dot_product_attention(*states, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize(
    ("shapes", "called"),
    [
        ([(1, 1), (1, 40), (1, 17)], "decode"),
        ([(5, 5)], "varlen"),
        ([(1, 33), (20, 50), (1, 16), (7, 7)], "varlen"),
    ],
)
def test_it_sees_what_the_plain_attention_sees(
    shapes: Sequence[tuple[int, int]], called: str, *, scattered: bool
) -> None:
    layout, num_blocks = layout_of(shapes, scattered)
    written_out = WrittenOut()
    backend = partial(FlashAttention, Kernels(written_out.decode, written_out.varlen))
    found = attended(backend, layout, num_blocks, torch.float32)
    assert torch.allclose(found, attended(PlainAttention, layout, num_blocks, torch.float32), atol=1e-5)
    assert written_out.calls == [called]


def test_it_is_chosen_where_it_is_installed_and_can_read_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, kernels = torch.device("cuda"), Kernels(WrittenOut().decode, WrittenOut().varlen)
    monkeypatch.setattr(flash_attention, "is_installed", lambda: True)
    monkeypatch.setattr(flash_attention, "_kernels", lambda: kernels)
    chosen = attention_for(cuda, torch.bfloat16, 256)
    assert isinstance(chosen, partial)
    assert (chosen.func, chosen.args) == (FlashAttention, (kernels,))
    assert attention_for(cuda, torch.bfloat16, 16) is PlainAttention, "it reads pages of 256"
    assert attention_for(cuda, torch.float32, 256) is PlainAttention
    assert attention_for(CPU, torch.bfloat16, 256) is not chosen
    monkeypatch.setattr(flash_attention, "is_installed", lambda: False)
    assert attention_for(cuda, torch.bfloat16, 256) is PlainAttention


def test_the_heads_of_the_tests_share_keys() -> None:
    assert CONFIG.num_heads > CONFIG.num_kv_heads
