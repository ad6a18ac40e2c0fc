"""A packed tower says what the plain one says and is no less exact; where nothing can be packed a tower is plain."""

from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional

from shared import packed_linear
from shared.checkpoint import Checkpoint, read_config
from shared.packed_linear import PackedLinear, can_pack, pack_linears
from tests.golden_cases import GOLDEN
from vision_service.model import loader
from vision_service.model.loader import LoadedTower, load_tower
from vision_service.model.tower import TowerConfig, VisionTower

CPU = torch.device("cpu")
TINY = GOLDEN / "checkpoints/internvl3-8b-tiny"
needs_packing = pytest.mark.skipif(not can_pack(CPU, torch.bfloat16), reason="this processor has no fast bfloat16")


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Linear(64, 256)
        self.act = nn.GELU()
        self.narrow = nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.narrow(self.act(self.widen(x)))
        return out


def random_layer(inputs: int, outputs: int) -> tuple[torch.Tensor, nn.Parameter]:
    generator = torch.Generator().manual_seed(inputs)
    matrix = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    bias = torch.randn(outputs, generator=generator)
    return matrix.bfloat16(), nn.Parameter(bias.bfloat16(), requires_grad=False)


def packed_layer(matrix: torch.Tensor, bias: nn.Parameter | None, gelu: bool = False) -> PackedLinear:
    layer = PackedLinear(bias, rows=33, gelu=gelu)
    layer.hold(matrix)
    return layer


@cache
def tower(dtype: torch.dtype, plain: bool = False) -> VisionTower:
    config = TowerConfig.of(read_config(TINY))
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr(loader, "can_pack", lambda device, dtype: False)
        return load_tower(Checkpoint(TINY), config, CPU, dtype).tower


def some_tiles(count: int = 4) -> torch.Tensor:
    return torch.randint(256, (count, 56, 56, 3), generator=torch.Generator().manual_seed(5)).to(torch.uint8)


@needs_packing
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 192), (56, 40), (588, 96)])
def test_a_packed_layer_returns_the_plain_layers_bits(inputs: int, outputs: int) -> None:
    matrix, bias = random_layer(inputs, outputs)
    rows = torch.randn(2, 33, inputs, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(packed_layer(matrix, bias)(rows), functional.linear(rows, matrix, bias))
    assert torch.equal(packed_layer(matrix, None)(rows[0, :1]), functional.linear(rows[0, :1], matrix))


@needs_packing
def test_a_gelu_inside_the_layer_is_more_exact_than_one_behind_it() -> None:
    matrix, bias = random_layer(128, 512)
    rows = torch.randn(65, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = functional.gelu(functional.linear(rows.double(), matrix.double(), bias.double()))
    behind = functional.gelu(functional.linear(rows, matrix, bias))
    inside = packed_layer(matrix, bias, gelu=True)(rows)
    assert (inside.double() - exact).abs().mean() <= (behind.double() - exact).abs().mean()


@needs_packing
def test_a_packed_layer_keeps_no_second_copy_of_its_matrix() -> None:
    matrix, bias = random_layer(64, 192)
    layer = packed_layer(matrix, bias)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert not [tensor for tensor in vars(layer).values() if tensor is matrix]


def test_only_chosen_layers_are_packed_and_a_gelu_behind_one_becomes_part_of_it() -> None:
    model = TwoLayers()
    assert list(pack_linears(model, 1, lambda name, linear: name == "widen")) == ["widen.weight"]
    assert [type(child) for child in model.children()] == [PackedLinear, nn.Identity, nn.Linear]


@needs_packing
def test_a_packed_model_computes_what_it_computed() -> None:
    model = TwoLayers().bfloat16().requires_grad_(False)
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    expected, matrices = model(rows), dict(model.named_parameters())
    for name, hold in pack_linears(model, 5, lambda name, linear: True).items():
        hold(matrices[name])
    torch.testing.assert_close(model(rows), expected, atol=0.01, rtol=0.02)


@needs_packing
def test_a_packed_tower_is_no_further_from_float32_than_a_plain_one() -> None:
    with torch.inference_mode():
        exact = tower(torch.float32)(some_tiles())
        plain = tower(torch.bfloat16, plain=True)(some_tiles()).float()
        fast = tower(torch.bfloat16)(some_tiles()).float()
    assert not torch.equal(fast, exact)
    assert (fast - exact).abs().mean() < 1.05 * (plain - exact).abs().mean()


@needs_packing
def test_the_layers_of_a_bfloat16_tower_are_packed_and_its_names_are_those_of_the_checkpoint() -> None:
    fast, plain = tower(torch.bfloat16), tower(torch.bfloat16, plain=True)
    packed_names = {name for name, module in fast.named_modules() if isinstance(module, PackedLinear)}
    layers = fast.config.vit.num_layers
    names = ("attn.qkv", "attn.proj", "mlp.fc1")
    assert packed_names >= {f"vision_model.encoder.layers.{i}.{name}" for i in range(layers) for name in names}
    kept = {name for name, _ in fast.named_parameters()}
    assert {name for name, _ in plain.named_parameters()} - kept == {f"{name}.weight" for name in packed_names}


def test_only_bfloat16_on_a_cpu_is_packed() -> None:
    assert not can_pack(CPU, torch.float32)
    assert not can_pack(CPU, torch.float16)
    assert not can_pack(torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize("refusal", [AttributeError, RuntimeError, NotImplementedError])
def test_a_torch_without_the_operators_gets_a_plain_tower(
    refusal: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Missing:
        def __getattr__(self, name: str) -> object:
            raise refusal(name)

    monkeypatch.setattr(packed_linear, "_operators", lambda: Missing())
    packed_linear._operators_work.cache_clear()
    try:
        config = TowerConfig.of(read_config(TINY))
        loaded: LoadedTower = load_tower(Checkpoint(TINY), config, CPU, torch.bfloat16)
    finally:
        packed_linear._operators_work.cache_clear()
    assert not any(isinstance(module, PackedLinear) for module in loaded.tower.modules())
    with torch.inference_mode():
        assert torch.equal(loaded.tower(some_tiles()), tower(torch.bfloat16, plain=True)(some_tiles()))
