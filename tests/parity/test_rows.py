"""Every released model: each of its tensors belongs to exactly one service, in the original layout and in `-hf`."""

import gzip
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest

from llm_service.model.config import architecture_of, decoder_config
from llm_service.model.loader import empty_decoder
from llm_service.model.names import FAMILIES, LLAMA, shapes_of
from llm_service.model.names import PREFIXES as LANGUAGE_PREFIXES
from llm_service.model.names import weight_plan as language_plan
from shared.checkpoint import InternVLConfig, Naming, read_config
from shared.weights import WeightPlan
from tests.golden_cases import GOLDEN
from vision_service.model.loader import empty_tower
from vision_service.model.names import PREFIXES as VISION_PREFIXES
from vision_service.model.names import weight_plan as vision_plan
from vision_service.model.tower import TowerConfig

ROWS = sorted(path.name.removesuffix(".json.gz") for path in (GOLDEN / "rows").glob("InternVL*.json.gz"))
Shapes = Mapping[str, tuple[int, ...]]


@cache
def row(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(gzip.decompress((GOLDEN / "rows" / f"{name}.json.gz").read_bytes()))
    return content


@cache
def native_names() -> dict[str, dict[str, list[str]]]:
    names: dict[str, dict[str, list[str]]] = json.loads(
        gzip.decompress((GOLDEN / "rows/native_names.json.gz").read_bytes())
    )
    return names


@pytest.fixture(params=ROWS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config(name: str, tmp_path: Any) -> InternVLConfig:
    (tmp_path / "config.json").write_text(json.dumps(row(name)["config"]))
    return read_config(tmp_path)


def plans(config: InternVLConfig, naming: Naming) -> tuple[tuple[WeightPlan, Shapes], tuple[WeightPlan, Shapes]]:
    """Return the vision side's plan and the language side's, each with the shapes of its model's weights."""
    tower = empty_tower(TowerConfig.of(config))
    towers_shapes = {name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    family = FAMILIES[architecture_of(config.llm)]
    if naming is not Naming.ORIGINAL and family.grouped_qkv:
        family = LLAMA  # what InternLM2 is converted to
    decoder = empty_decoder(decoder_config(config.llm))
    shapes = shapes_of(decoder)
    return (
        (vision_plan(towers_shapes, naming), towers_shapes),
        (language_plan(decoder.config, shapes, family, naming), shapes),
    )


def claimed(plan: WeightPlan) -> list[tuple[str, tuple[int, ...]]]:
    return [(part.name, part.shape) for parts in plan.values() for part in parts]


def assert_complete(plan: WeightPlan, shapes: Shapes) -> None:
    """Every row of every weight is filled exactly once, by a tensor with as many rows."""
    assert plan.keys() == shapes.keys()
    for name, parts in plan.items():
        runs = sorted((run.start, run.stop) for part in parts for run in part.runs)
        assert [start for start, _ in runs] == [0, *(stop for _, stop in runs[:-1])], name
        assert runs[-1][1] == shapes[name][0], name
        for part in parts:
            assert part.shape == (sum(map(len, part.runs)), *shapes[name][1:]), name


def test_all_released_models_are_here() -> None:
    assert len(ROWS) == 21
    assert native_names().keys() == set(ROWS)


def test_every_tensor_is_claimed_by_one_service_with_its_shape(name: str, config: InternVLConfig) -> None:
    expected = {tensor: tuple(shape) for tensor, shape in row(name)["tensors"].items()}
    (vision, vision_shapes), (language, language_shapes) = plans(config, Naming.ORIGINAL)
    found = [*claimed(vision), *claimed(language)]
    assert len(found) == len(expected)
    assert dict(found) == expected
    assert_complete(vision, vision_shapes)
    assert_complete(language, language_shapes)


@pytest.mark.parametrize("naming", [Naming.HF_NATIVE, Naming.HF])
def test_every_tensor_of_the_hf_layout_is_claimed_by_one_service(
    name: str, config: InternVLConfig, naming: Naming
) -> None:
    expected = {other for names in native_names()[name].values() for other in names}
    if naming is Naming.HF:
        expected = {released(tensor) for tensor in expected}
    (vision, vision_shapes), (language, language_shapes) = plans(config, naming)
    found = [*claimed(vision), *claimed(language)]
    assert len(found) == len(expected)
    assert {tensor for tensor, _ in found} == expected
    assert all(tensor.startswith(VISION_PREFIXES[naming]) for tensor, _ in claimed(vision))
    assert all(tensor.startswith(LANGUAGE_PREFIXES[naming]) for tensor, _ in claimed(language))
    assert_complete(vision, vision_shapes)
    assert_complete(language, language_shapes)


def released(native: str) -> str:
    """Return what the `-hf` repositories call a tensor on disk."""
    if native.startswith("model.language_model."):
        return native.replace("model.language_model.", "language_model.model.", 1)
    return f"language_model.{native}" if native.startswith("lm_head.") else native.removeprefix("model.")


def test_the_weights_have_the_published_number_of_parameters(name: str, config: InternVLConfig) -> None:
    decoder = empty_decoder(decoder_config(config.llm))
    tower = empty_tower(TowerConfig.of(config))
    count = sum(weight.numel() for model in (decoder, tower) for weight in model.parameters())
    assert count == row(name)["n_parameters"]
