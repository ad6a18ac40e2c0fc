"""A language model on several devices: where its layers go, and that it says what it says on one."""

import gzip
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from math import ceil, inf
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm_service.app import LoadedModel
from llm_service.engine.sequence import EngineRequest, SamplingParams, TokenOutput
from llm_service.model.attention import BatchLayout, KVCache, Span
from llm_service.model.config import DecoderConfig, decoder_config
from llm_service.model.decoder import Decoder
from llm_service.model.loader import LoadSettings, empty_decoder, load_decoder
from llm_service.model.names import shapes_of
from llm_service.model.placement import WeightSizes, layer_of, place_layers, plan_placement, weight_sizes
from llm_service.model.rope import Rope
from llm_service.prompt.splice import PromptTokens
from llm_service.settings import LlmSettings
from shared.checkpoint import read_config
from shared.errors import CheckpointError
from shared.quantize import scheme_of
from tests.engine_outputs import each
from tests.golden_cases import GOLDEN

ROWS = sorted(path.name.removesuffix(".json.gz") for path in (GOLDEN / "rows").glob("InternVL*.json.gz"))
TINY = GOLDEN / "checkpoints/internvl3-8b-tiny"  # three layers
CPU, META = torch.device("cpu"), torch.device("meta")
GIB = 1 << 30


@cache
def row_config(name: str) -> DecoderConfig:
    row = json.loads(gzip.decompress((GOLDEN / "rows" / f"{name}.json.gz").read_bytes()))
    return decoder_config(row["config"]["llm_config"])


@cache
def row_sizes(name: str) -> WeightSizes:
    config = row_config(name)
    return weight_sizes(shapes_of(empty_decoder(config)), config.num_layers, 2, None)


def loads(plan: Sequence[int], sizes: WeightSizes, num_devices: int) -> list[int]:
    """Return the bytes on each device."""
    own = [sizes.outside, *[0] * (num_devices - 1)]
    for device, size in zip(plan, sizes.layers, strict=True):
        own[device] += size
    return own


def card_plan(num_layers: int, num_devices: int) -> list[int]:
    """The model cards' split_model: every device takes as many layers, rounded up, the first one half of that."""
    count = ceil(num_layers / (num_devices - 0.5))
    counts = [ceil(count / 2), *[count] * (num_devices - 1)]
    plan = [device for device, own in enumerate(counts) for _ in range(own)][:num_layers]
    plan[-1] = 0
    return plan


def fullest(plan: Sequence[int]) -> float:
    """Return the most layers on a device, the first one counting as half a device."""
    return max(count / (0.5 if device == 0 else 1) for device, count in Counter(plan).items())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("num_devices", range(1, 9))
@pytest.mark.parametrize("name", ROWS)
def test_every_released_model_is_shared_out_evenly(name: str, num_devices: int, shared: bool) -> None:
    sizes = row_sizes(name)
    plan = plan_placement(sizes, [500 * GIB] * num_devices, vit_shares_first=shared)
    assert len(plan) == row_config(name).num_layers
    assert plan[0] == plan[-1] == 0
    assert list(plan[:-1]) == sorted(plan[:-1])  # a step passes every device once and ends where it began
    assert set(plan) == set(range(num_devices))
    on = loads(plan, sizes, num_devices)
    assert sum(on) == sizes.total
    layer = max(sizes.layers)
    if num_devices > 2:
        assert max(on[1:]) - min(on[1:]) <= 2 * layer
    # The first is filled like the others, as half a device where it is shared, unless what has to be there is more.
    needed = sizes.outside + sizes.layers[0] + sizes.layers[-1]
    if num_devices > 1:
        assert on[0] <= max(needed, max(on[1:]) * (0.5 if shared else 1) + layer)


@pytest.mark.parametrize("num_devices", range(1, 9))
@pytest.mark.parametrize("name", ROWS)
def test_no_device_has_more_layers_than_the_model_cards_give_one(name: str, num_devices: int) -> None:
    num_layers = row_config(name).num_layers
    plan = plan_placement(WeightSizes((1,) * num_layers, 0), [inf] * num_devices, vit_shares_first=True)
    if num_devices > 1:
        plan = plan_placement(WeightSizes((1,) * num_layers, 0), [1e6] * num_devices, vit_shares_first=True)
    assert fullest(plan) <= fullest(card_plan(num_layers, num_devices))


def test_devices_with_more_free_memory_take_more() -> None:
    sizes = row_sizes("InternVL3-78B")
    on = loads(plan_placement(sizes, [80 * GIB, 40 * GIB, 80 * GIB, 40 * GIB]), sizes, 4)
    assert on[1] < 0.6 * on[0]
    assert on[3] < 0.6 * on[2]
    assert abs(on[0] - on[2]) <= 2 * max(sizes.layers)


def test_a_model_that_fits_in_one_way_only_is_placed_in_that_way() -> None:
    sizes = WeightSizes((10,) * 6, 5)
    assert plan_placement(sizes, [25, 10, 30]) == (0, 1, 2, 2, 2, 0)
    assert plan_placement(sizes, [55, 10, 0]) == (0, 0, 0, 0, 1, 0)
    with pytest.raises(CheckpointError, match="--devices"):
        plan_placement(sizes, [25, 19, 29])
    with pytest.raises(CheckpointError, match="--devices"):
        plan_placement(sizes, [25, 10, 30], vit_shares_first=True)


def test_what_does_not_fit_is_said_in_gib() -> None:
    with pytest.raises(CheckpointError, match=r"weights take 135\.4 GiB.*there is room for 40\.0, 80\.0 GiB"):
        plan_placement(row_sizes("InternVL3-78B"), [80 * GIB, 80 * GIB], vit_shares_first=True)


@given(
    layers=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    outside=st.integers(0, 60),
    free=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    shared=st.booleans(),
)
def test_a_plan_never_asks_more_of_a_device_than_it_has(
    layers: list[int], outside: int, free: list[int], shared: bool
) -> None:
    sizes = WeightSizes(tuple(layers), outside)
    room = [free[0] / 2 if shared else free[0], *free[1:]]
    try:
        plan = plan_placement(sizes, free, vit_shares_first=shared)
    except CheckpointError:
        assert not any(
            all(own <= has for own, has in zip(loads(plan, sizes, len(free)), room, strict=True))
            for plan in every_plan(len(layers), len(free))
        )
        return
    assert plan in set(every_plan(len(layers), len(free)))
    assert all(own <= has for own, has in zip(loads(plan, sizes, len(free)), room, strict=True))


def every_plan(num_layers: int, num_devices: int) -> Iterator[tuple[int, ...]]:
    """Return all plans with first and last layer on the first device and runs between."""

    def runs(count: int, first: int) -> Iterator[tuple[int, ...]]:
        if not count:
            yield ()
        elif first < num_devices:
            for device in range(first, num_devices):
                yield from ((device, *rest) for rest in runs(count - 1, device))

    for middle in runs(max(0, num_layers - 2), 0):
        yield (0, *middle, 0)[:num_layers]


@pytest.mark.parametrize(("quantization", "part"), [("int8", 0.51), ("nf4", 0.29)])
def test_a_quantized_model_is_planned_with_the_memory_that_it_takes(quantization: Any, part: float) -> None:
    config = row_config("InternVL3-8B")
    sizes = weight_sizes(shapes_of(empty_decoder(config)), config.num_layers, 2, scheme_of(quantization))
    assert sizes.outside == row_sizes("InternVL3-8B").outside
    assert sizes.layers[0] < part * row_sizes("InternVL3-8B").layers[0]


def test_the_planned_sizes_are_those_of_the_loaded_weights() -> None:
    for quantization in ("none", "int8", "nf4"):
        decoder = load(LoadSettings(CPU, torch.bfloat16, quantization))
        shapes = shapes_of(empty_decoder(decoder.config))
        sizes = weight_sizes(shapes, decoder.config.num_layers, 2, scheme_of(quantization))
        assert sizes.total == decoder.weight_bytes


def load(settings: LoadSettings, directory: Path = TINY) -> Decoder:
    return load_decoder(directory, read_config(directory), settings)


def test_weights_and_their_cache_are_on_the_devices_of_the_plan() -> None:
    """The second device knows shapes and has no memory: what is there is nowhere else."""
    decoder = load(LoadSettings(CPU, torch.float32, more_devices=(META,)))
    assert decoder.layer_devices == (CPU, META, CPU)
    assert decoder.device == CPU
    for name, weight in decoder.named_parameters():
        assert weight.is_meta is name.startswith("layers.1."), name
    cache = KVCache(decoder.config, 4, 16, torch.float32, decoder.layer_devices)
    span = Span(0, 1, 1, torch.zeros(1, dtype=torch.int64))
    assert cache.read(0, span)[0].device == cache.read(2, span)[1].device == CPU
    assert cache.read(1, span)[0].device == META


@pytest.mark.parametrize(
    ("devices", "reason"),
    [
        (["cuda:0", "cpu"], "on GPUs and elsewhere"),
        (["cuda:0", "cuda:1", "cuda:0"], "twice"),
        (["cuda", "cuda:0"], "twice"),
    ],
)
def test_devices_that_cannot_be_used_together_are_refused(devices: list[str], reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"--devices.*{reason}"):
        place_layers(WeightSizes((1, 1, 1), 0), [torch.device(name) for name in devices], vit_shares_first=False)


class Devices(TorchDispatchMode):
    """Notes the devices on which the layers' products are computed, in order, without repetitions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            on = {str(leaf.device) for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
            assert len(on) == 1
            if self.seen[-1:] != sorted(on):
                self.seen += on
        return func(*args, **(kwargs or {}))


class Slicing(TorchFunctionMode):
    """Takes parts of tensors by operators: indexing asks the driver of a tensor's device, which need not be there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            return part_of(*args)
        if func is torch.Tensor.__setitem__:
            return part_of(*args[:2]).add_(args[2])  # asks no driver either; there are no values to be kept
        return func(*args, **(kwargs or {}))


def part_of(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    dimension = 0
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, int):
            tensor = tensor.select(dimension, part)
            continue
        if part is None:
            tensor = tensor.unsqueeze(dimension)
        else:
            start, stop, _ = part.indices(tensor.shape[dimension])
            tensor = tensor.narrow(dimension, start, stop - start)
        dimension += 1
    return tensor


@contextmanager
def two_gpus() -> Iterator[Devices]:
    """Tensors that have a device and a shape and no values; an operation over both devices fails."""
    devices = Devices()
    with FakeTensorMode(), devices, Slicing():
        yield devices


def test_a_step_passes_from_device_to_device_with_all_that_a_layer_needs() -> None:
    """Two GPUs that only pretend: what a real step would have to move and does not raises here."""
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    config = row_config("InternVL3-1B")
    plan = plan_placement(row_sizes("InternVL3-1B"), [20 * GIB, 40 * GIB])
    assert set(plan) == {0, 1}
    with two_gpus() as devices:
        decoder = empty_decoder(config)
        for name, weight in list(decoder.named_parameters()):
            owner, _, attribute = name.rpartition(".")
            layer = layer_of(name)
            device = first if layer is None else (first, second)[plan[layer]]
            placed = nn.Parameter(torch.empty(weight.shape, device=device), requires_grad=False)
            setattr(decoder.get_submodule(owner), attribute, placed)
        cache = KVCache(config, 8, 16, torch.float32, decoder.layer_devices)
        cache.copy_block(1, 2)
        ids = torch.zeros(12, dtype=torch.int64, device=first)
        blocks = torch.zeros(1, dtype=torch.int64, device=first)
        # A prompt, and a token of another sequence.
        layout = BatchLayout((Span(0, 11, 11, blocks), Span(11, 12, 16, blocks)), ids)
        rope = Rope(replace(config.rope, kind="default"), config.head_dim, first)  # others look at values
        hidden = decoder(decoder.embed(ids), ids, ids, layout, cache, rope)
        assert hidden.device == first
        assert decoder.logits(hidden).shape == (12, config.vocab_size)
    assert devices.seen == ["cuda:0", "cuda:1", "cuda:0"]


def test_a_layout_goes_to_a_device_whole_and_stays_where_it_is() -> None:
    blocks = (torch.tensor([3, 1]), torch.tensor([2]))
    layout = BatchLayout((Span(0, 2, 20, blocks[0]), Span(2, 3, 9, blocks[1])), torch.tensor([50, 51, 40]))
    assert layout.to(CPU) is layout
    moved = layout.to(META)
    assert moved.slots.device == META
    assert [(span.start, span.end, span.length, span.blocks.shape, span.blocks.device) for span in moved.spans] == [
        (0, 2, 20, (2,), META),
        (2, 3, 9, (1,), META),
    ]


def loaded(**settings: Any) -> LoadedModel:
    return LoadedModel(LlmSettings(model=TINY, kv_cache_bytes=8 << 20, **settings))


async def generated(model: LoadedModel) -> list[list[int]]:
    engine = model.engine()
    engine.start()
    try:
        answers = []
        for prompt in (range(5, 60), range(100, 300)):
            request = EngineRequest(PromptTokens(tuple(prompt)), (), SamplingParams(max_output_tokens=12))
            outputs = [output async for output in each(engine.generate(request))]
            answers.append([output.token_id for output in outputs if isinstance(output, TokenOutput)])
        assert all(len(answer) == 12 for answer in answers)
        return answers
    finally:
        engine.stop()


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
async def test_a_model_on_two_devices_says_what_it_says_on_one(quantization: str) -> None:
    one, two = loaded(quantization=quantization), loaded(quantization=quantization, devices="cpu:0,cpu:1")
    assert await generated(two) == await generated(one)


@pytest.mark.parametrize("devices", ["", "cpu,", ",cpu", "cpu,,cpu"])
def test_a_list_of_devices_with_a_gap_is_refused(devices: str) -> None:
    with pytest.raises(ValueError, match="devices"):
        LlmSettings(model=TINY, devices=devices)


def test_one_device_is_still_given_by_its_old_flag() -> None:
    settings = LlmSettings.from_command_line("llm", ["--model", str(TINY), "--device", "cpu", "--quantization", "nf4"])
    assert (settings.devices, settings.quantization) == ("cpu", "nf4")
