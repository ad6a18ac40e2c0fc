"""Loading takes the memory of the weights that are kept, and reads the bytes of no others."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llm_service.model.config import architecture_of, decoder_config
from llm_service.model.loader import empty_decoder
from llm_service.model.names import FAMILIES, shapes_of
from llm_service.model.names import weight_plan as language_plan
from shared.checkpoint import Naming, read_config
from tests.golden_cases import GOLDEN
from vision_service.model.loader import empty_tower
from vision_service.model.tower import TowerConfig

ROOT = Path(__file__).parents[2]
# A vocabulary that is a third of the weights, as in the smallest released models: the hardest case, since its two
# matrices are read as one tensor each. InternLM2, whose fused rows change places.
LLM = {
    "architectures": ["InternLM2ForCausalLM"],
    "hidden_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 4096,
    "vocab_size": 50000,
}
VISION = {
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 448,
}
_MEASURE = """
import json, sys
from pathlib import Path
import torch
from shared.checkpoint import Checkpoint, read_config
from llm_service.model.loader import LoadSettings, empty_decoder, load_decoder
from vision_service.model.loader import empty_tower, load_tower
from vision_service.model.tower import TowerConfig

def number(file, key):
    lines = dict(line.split(":", 1) for line in Path(file).read_text().splitlines())
    return int(lines[key].split()[0])

directory, side, dtype = Path(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3])
config, device = read_config(directory), torch.device("cpu")
torch.ones(4, dtype=dtype) @ torch.ones(4, dtype=dtype)
before_kib, read_before = number("/proc/self/status", "VmRSS"), number("/proc/self/io", "rchar")
if side == "language":
    model = load_decoder(directory, config, LoadSettings(device, dtype))
    shapes = empty_decoder(model.config)
else:
    model = load_tower(Checkpoint(directory), TowerConfig.of(config), device, dtype).tower
    shapes = empty_tower(model.config)
print(json.dumps({
    "peak": (number("/proc/self/status", "VmHWM") - before_kib) * 1024,
    "read": number("/proc/self/io", "rchar") - read_before,
    "kept": sum(weight.numel() for weight in shapes.parameters()) * dtype.itemsize,
}))
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("large") / "model"
    directory.mkdir()
    raw = json.loads((GOLDEN / "checkpoints/internvl2-8b-tiny/config.json").read_text())
    raw["llm_config"] |= LLM
    raw["vision_config"] |= VISION
    (directory / "config.json").write_text(json.dumps(raw | {"force_image_size": 448}))
    config = read_config(directory)
    decoder = empty_decoder(decoder_config(config.llm))
    plan = language_plan(decoder.config, shapes_of(decoder), FAMILIES[architecture_of(config.llm)], Naming.ORIGINAL)
    shapes: dict[str, tuple[int, ...]] = {part.name: part.shape for parts in plan.values() for part in parts}
    shapes |= {name: tuple(t.shape) for name, t in empty_tower(TowerConfig.of(config)).state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.1, 0.1, generator=generator)
        for name, shape in shapes.items()
    }
    save_file(weights, directory / "model.safetensors")
    return directory


def measured(directory: Path, side: str, dtype: str) -> dict[str, Any]:
    command = [sys.executable, "-c", _MEASURE, str(directory), side, dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory and bytes from /proc")
@pytest.mark.parametrize(("side", "dtype"), [("language", "bfloat16"), ("vision", "float16"), ("vision", "bfloat16")])
def test_the_peak_is_the_weights_and_little_more(directory: Path, side: str, dtype: str) -> None:
    found = measured(directory, side, dtype)
    assert found["kept"] > 200e6
    assert found["peak"] < 1.2 * found["kept"]
    # All of its own tensors once, none of the other side's.
    assert found["kept"] <= found["read"] < found["kept"] + (64 << 20)  # modules that are imported late are read too
