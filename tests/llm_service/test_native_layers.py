"""All layers in one native call compute what the layers compute one by one, bit for bit."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_service.model.attention import BatchLayout, KVCache
from llm_service.model.config import DecoderConfig, RopeConfig
from llm_service.model.decoder import Decoder
from llm_service.model.loader import pack_decoder
from llm_service.model.native_layers import NativeLayers
from llm_service.model.rope import Rope
from shared.native.library import kernels
from tests.golden_models import CPU
from tests.llm_service.test_attention import BLOCK, CONFIG, layout_of

pytestmark = pytest.mark.skipif(kernels() is None, reason="the kernels were not compiled, or this processor has no AMX")
PLAIN = replace(
    CONFIG,
    hidden_size=160,
    num_layers=3,
    head_dim=32,
    intermediate_size=200,
    vocab_size=50,
    norm_eps=1e-5,
    rope=RopeConfig(1e4, "default", 1.0, 64),
)
BIASED = replace(PLAIN, qkv_bias=True, out_bias=True, mlp_bias=True, hidden_size=96, num_kv_heads=6)
WIDE = replace(PLAIN, num_layers=2, hidden_size=1100, intermediate_size=800, qkv_bias=True)


def decoder_of(config: DecoderConfig) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(config)
    for parameter in decoder.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.1 + (parameter.dim() == 1))
    decoder = decoder.bfloat16()
    pack_decoder(decoder)
    return decoder


DECODERS = [decoder_of(config) for config in (PLAIN, BIASED, WIDE)] if kernels() else []


def filled_cache(config: DecoderConfig, num_blocks: int) -> KVCache:
    cache = KVCache(config, num_blocks, BLOCK, torch.bfloat16, CPU)
    for layer in range(config.num_layers):
        rows = cache.layer(layer).rows
        rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(layer)))
    return cache


def computed(decoder: Decoder, layout: BatchLayout, num_blocks: int, *, at_once: bool) -> list[torch.Tensor]:
    """Return the final hidden states, and every layer's cache."""
    cache, config = filled_cache(decoder.config, num_blocks), decoder.config
    lengths = torch.tensor([span.length for span in layout.spans])
    hidden = torch.randn(len(lengths), config.hidden_size, generator=torch.Generator().manual_seed(9)).bfloat16()
    decoder._native = None if at_once else (cache, None)
    found = decoder(hidden, lengths - 1, lengths, layout, cache, Rope(config.rope, config.head_dim, CPU))
    assert (decoder._native[1] is not None) == at_once
    return [found, *(cache.layer(layer).rows for layer in range(config.num_layers))]


@torch.inference_mode()
@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(range(3)),
    st.lists(st.integers(1, 90), min_size=1, max_size=33),
    st.booleans(),
)
def test_layers_at_once_compute_what_they_compute_one_by_one(which: int, lengths: list[int], scattered: bool) -> None:
    layout, num_blocks = layout_of([(1, length) for length in lengths], scattered)
    decoder = DECODERS[which]
    one_by_one = computed(decoder, layout, num_blocks, at_once=False)
    for found, expected in zip(computed(decoder, layout, num_blocks, at_once=True), one_by_one, strict=True):
        assert torch.equal(found, expected)


def test_they_take_single_tokens_of_a_few_sequences() -> None:
    decoder = DECODERS[0]
    native = NativeLayers.of(decoder.config, filled_cache(decoder.config, 4), decoder._layers, decoder.norm.weight)
    assert native is not None
    assert native.take(layout_of([(1, 5)] * 32, scattered=False)[0])
    assert not native.take(layout_of([(1, 5)] * 33, scattered=False)[0])
    assert not native.take(layout_of([(1, 5), (2, 5)], scattered=False)[0])


def test_they_are_not_for_other_types_other_shapes_and_matrices_that_are_not_packed() -> None:
    decoder = DECODERS[0]
    other_type = KVCache(decoder.config, 1, BLOCK, torch.float32, CPU)
    assert NativeLayers.of(decoder.config, other_type, decoder._layers, decoder.norm.weight) is None
    cache = filled_cache(decoder.config, 1)
    assert NativeLayers.of(replace(decoder.config, head_dim=40), cache, decoder._layers, decoder.norm.weight) is None
    assert NativeLayers.of(PLAIN, cache, Decoder(PLAIN).bfloat16()._layers, decoder.norm.weight) is None


def test_another_cache_is_written_to_where_one_comes() -> None:
    decoder, (layout, num_blocks) = DECODERS[0], layout_of([(1, 20)], scattered=False)
    with torch.inference_mode():
        first = computed(decoder, layout, num_blocks, at_once=True)
        cache = filled_cache(decoder.config, num_blocks)
        lengths = torch.tensor([20])
        hidden = torch.randn(1, 160, generator=torch.Generator().manual_seed(9)).bfloat16()
        again = decoder(hidden, lengths - 1, lengths, layout, cache, Rope(PLAIN.rope, 32, CPU))
    assert torch.equal(again, first[0])
    assert torch.equal(cache.layer(2).rows, first[3])
