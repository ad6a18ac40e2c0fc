"""A vision transformer of fewer bits: how near it stays, and that its embeddings have names of their own."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from shared.checkpoint import Checkpoint, read_config
from shared.digest import digest_of
from shared.errors import EmbeddingNotFound
from shared.quantize import Quantization
from tests.golden_cases import GOLDEN
from tests.rpc.vision_replica import TINY, error_of, replica, visual_tokens_of
from vision_service.model.loader import LoadedTower, load_tower
from vision_service.model.tower import TowerConfig

PICTURE = (GOLDEN / "images/rgb_landscape.png").read_bytes()
# The least cosine between a visual token and that of the whole weights, over three kinds of tower. These have random
# weights 48 and 64 wide; errors of wider rows cancel out more.
LEAST_COSINE: Mapping[Quantization, float] = {"int8": 0.999, "nf4": 0.94}
CHECKPOINTS = ("internvl3-8b-tiny", "internvl2-26b-tiny", "internvl2-8b-tiny")


@cache
def tower(checkpoint: str, quantization: Quantization, dtype: torch.dtype = torch.float32) -> LoadedTower:
    directory = GOLDEN / "checkpoints" / checkpoint
    config = TowerConfig.of(read_config(directory))
    return load_tower(Checkpoint(directory), config, torch.device("cpu"), dtype, quantization)


@torch.inference_mode()
def tokens(loaded: LoadedTower) -> torch.Tensor:
    size = loaded.tower.config.image_size
    tiles = torch.randint(256, (4, size, size, 3), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    return loaded.tower(tiles).flatten(0, 1).float()


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_visual_tokens_stay_near_those_of_the_whole_weights(checkpoint: str, quantization: Quantization) -> None:
    whole = tokens(tower(checkpoint, "none"))
    for dtype in (torch.float32, torch.bfloat16):
        nearness = functional.cosine_similarity(tokens(tower(checkpoint, quantization, dtype)), whole, dim=1)
        assert LEAST_COSINE[quantization] < nearness.min() < 0.99999


def test_only_the_matrices_of_the_blocks_are_quantized() -> None:
    whole, narrow = tower("internvl2-26b-tiny", "none"), tower("internvl2-26b-tiny", "int8", torch.bfloat16)
    kept = {name for name, _ in narrow.tower.named_parameters()}
    rounded = {name for name, _ in whole.tower.named_parameters()} - kept
    names = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    layers = whole.tower.config.vit.num_layers
    assert rounded == {f"vision_model.encoder.layers.{i}.{name}.weight" for i in range(layers) for name in names}
    assert {weight.dtype for weight in narrow.tower.parameters()} == {torch.bfloat16}
    assert narrow.num_parameters == whole.num_parameters


def test_equal_weights_of_other_bits_have_other_fingerprints() -> None:
    prints = [tower("internvl3-8b-tiny", quantization).fingerprint for quantization in ("none", "int8", "nf4")]
    assert len(set(prints)) == 3
    directory = GOLDEN / "checkpoints/internvl3-8b-tiny"
    config = TowerConfig.of(read_config(directory))
    again = load_tower(Checkpoint(directory), config, torch.device("cpu"), torch.bfloat16, "int8")
    assert again.fingerprint == prints[1]


async def test_a_quantized_service_finds_no_embedding_of_another(tmp_path: Path) -> None:
    handles: dict[str, Any] = {}
    for quantization in ("none", "int8"):
        async with replica(tmp_path, quantization=quantization) as at:
            assert isinstance(await error_of(at.encode(None, digest_of(PICTURE))), EmbeddingNotFound)
            handles[quantization] = (await at.encode(PICTURE)).handle
            rows = visual_tokens_of(await at.fetch(handles[quantization]))
            assert rows.shape == (handles[quantization].token_count, read_config(TINY).hidden_size)
    assert handles["none"].digest != handles["int8"].digest
    assert handles["none"].media_digest == handles["int8"].media_digest
