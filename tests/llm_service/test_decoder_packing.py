"""A packed decoder says what the plain one says, and its matrices are in memory once."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from llm_service.model import head, loader
from llm_service.model.decoder import Decoder
from llm_service.model.head import PackedHead
from llm_service.model.loader import LoadSettings, load_decoder, pack_decoder
from llm_service.prompt.splice import PromptTokens
from shared.checkpoint import read_config
from shared.packed_linear import PackedLinear, added, can_pack
from shared.quantize import Quantization
from tests.golden_cases import GOLDEN
from tests.golden_models import CPU, prompt_logits

TINY = GOLDEN / "checkpoints/internvl3-8b-tiny"
MATRICES = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
needs_packing = pytest.mark.skipif(not can_pack(CPU, torch.bfloat16), reason="this processor has no fast bfloat16")


def load(dtype: torch.dtype, quantization: Quantization = "none", *, plain: bool = False) -> Decoder:
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr(loader, "can_pack", lambda device, dtype: False)
        return load_decoder(TINY, read_config(TINY), LoadSettings(CPU, dtype, quantization))


@needs_packing
def test_a_packed_decoder_is_no_further_from_float32_than_a_plain_one() -> None:
    prompt = PromptTokens(tuple(range(60)))
    exact = prompt_logits(load(torch.float32), prompt)
    plain = prompt_logits(load(torch.bfloat16, plain=True), prompt)
    fast = prompt_logits(load(torch.bfloat16), prompt)
    assert not torch.equal(fast, exact)
    assert (fast - exact).abs().mean() < 1.05 * (plain - exact).abs().mean()


@needs_packing
def test_all_matrices_but_the_embeddings_are_packed_and_kept_once() -> None:
    fast, plain = load(torch.bfloat16), load(torch.bfloat16, plain=True)
    packed = {f"layers.{layer}.{name}.weight" for layer in range(fast.config.num_layers) for name in MATRICES}
    gone = dict(plain.named_parameters()).keys() - dict(fast.named_parameters()).keys()
    assert gone == packed | {"head.weight"}
    assert fast.weight_bytes == plain.weight_bytes
    assert not any(parameter.is_meta for parameter in fast.parameters())


@needs_packing
def test_packing_later_is_packing_while_loading() -> None:
    decoder = load(torch.bfloat16, plain=True)
    pack_decoder(decoder)
    prompt = PromptTokens(tuple(range(30)))
    assert torch.equal(prompt_logits(decoder, prompt), prompt_logits(load(torch.bfloat16), prompt))


@needs_packing
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_of_a_quantized_model_the_head_alone_is_packed(quantization: Quantization) -> None:
    decoder = load(torch.bfloat16, quantization)
    assert isinstance(decoder.head, PackedHead)
    assert not any(isinstance(module, PackedLinear) for module in decoder.layers.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_are_not_packed(dtype: torch.dtype) -> None:
    assert not any(isinstance(module, PackedLinear) for module in load(dtype).modules())


@needs_packing
@pytest.mark.parametrize("piece", [1, 7, 50, 333])
def test_a_head_packed_in_parts_returns_the_plain_heads_numbers(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_PART_BYTES", 100 * 64 * 2)  # so that there are four parts
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(333, 64, generator=generator).bfloat16()
    packed = PackedHead(64, 333, rows=16)
    for rows in matrix.split(piece):
        packed.add_rows(rows)
    assert len(packed.parts) == 4
    for count in (1, 5, 40):
        hidden = torch.randn(count, 64, generator=generator).bfloat16()
        torch.testing.assert_close(packed(hidden), functional.linear(hidden, matrix), atol=0.02, rtol=0.01)


@needs_packing
def test_a_heads_rows_of_another_type_are_packed_as_bfloat16() -> None:
    matrix = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    wide, narrow = PackedHead(32, 40, rows=16), PackedHead(32, 40, rows=16)
    wide.add_rows(matrix)
    narrow.add_rows(matrix.bfloat16())
    hidden = torch.ones(2, 32).bfloat16()
    assert torch.equal(wide(hidden), narrow(hidden))


@needs_packing
def test_a_sum_inside_a_packed_layer_is_more_exact_than_one_behind_it() -> None:
    generator = torch.Generator().manual_seed(2)
    matrix, bias = torch.randn(512, 128, generator=generator).bfloat16(), torch.randn(512, generator=generator)
    rows = torch.randn(33, 128, generator=generator).bfloat16()
    other = torch.randn(33, 512, generator=generator).bfloat16()
    plain = nn.Linear(128, 512).bfloat16().requires_grad_(False)
    plain.weight.copy_(matrix)
    assert plain.bias is not None
    plain.bias.copy_(bias)
    packed = PackedLinear(plain.bias, rows=16)
    packed.hold(matrix)
    exact = functional.linear(rows.double(), matrix.double(), plain.bias.double()) + other.double()
    inside, behind = added(packed, rows, other), added(plain, rows, other)
    assert (inside.double() - exact).abs().mean() < (behind.double() - exact).abs().mean()
