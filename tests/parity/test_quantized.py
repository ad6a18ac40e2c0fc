"""Language models of fewer bits: how near they stay to the reference, and what memory they take."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from llm_service.app import LoadedModel
from llm_service.engine.sequence import EngineRequest, SamplingParams, TokenOutput
from llm_service.model.config import decoder_config
from llm_service.model.decoder import Decoder
from llm_service.model.loader import LoadSettings, empty_decoder, load_decoder
from llm_service.model.names import FAMILIES, shapes_of, weight_plan
from llm_service.prompt.splice import PromptTokens
from llm_service.settings import LlmSettings
from shared.checkpoint import Naming, read_config
from shared.quantize import Quantization, scheme_of
from tests.engine_outputs import each
from tests.golden_cases import ALL_CHECKPOINTS, GOLDEN, turns
from tests.golden_models import CPU, golden_model, prompt_logits

ROOT = Path(__file__).parents[2]
# The least cosine with the reference's logits after a prompt. The golden weights are random and their rows 64 long: a
# rounding error of 9 % in every matrix, which is what four bits leave of random numbers, is never averaged out.
LEAST_COSINE: Mapping[Quantization, float] = {"int8": 0.999, "nf4": 0.8}
MEAN_COSINE: Mapping[Quantization, float] = {"int8": 0.9995, "nf4": 0.9}
BITS: list[Quantization] = ["int8", "nf4"]


@pytest.fixture(scope="module", autouse=True)
def drop_models() -> Iterator[None]:
    yield
    golden_model.cache_clear()
    decoder_of.cache_clear()


@cache
def decoder_of(checkpoint: str, quantization: Quantization, dtype: torch.dtype = torch.float32) -> Decoder:
    directory = GOLDEN / "checkpoints" / checkpoint
    return load_decoder(directory, read_config(directory), LoadSettings(CPU, dtype, quantization))


def cosines(checkpoint: str, decoder: Decoder) -> torch.Tensor:
    """Return the nearness of the logits after the prompts of a third of the cases, pictures among them."""
    cases = [case for case in turns(checkpoint) if case.first_logits is not None][::3]
    found = []
    for case in cases:
        request = golden_model(checkpoint).request(case)
        logits = prompt_logits(decoder, request.prompt, request.embeddings)[-1]
        found.append(functional.cosine_similarity(logits, torch.from_numpy(case.first_logits), dim=0))
    assert any(case.groups for case in cases)
    return torch.stack(found)


@pytest.mark.parametrize("quantization", BITS)
@pytest.mark.parametrize("checkpoint", ALL_CHECKPOINTS)
def test_first_logits_stay_near_the_references(checkpoint: str, quantization: Quantization) -> None:
    nearness = cosines(checkpoint, decoder_of(checkpoint, quantization))
    assert nearness.min() > LEAST_COSINE[quantization]
    assert nearness.mean() > MEAN_COSINE[quantization]
    assert nearness.max() < 0.99999  # the weights are rounded


@pytest.mark.parametrize(
    ("quantization", "least"), [("none", 0.9995), ("int8", 0.9985), ("nf4", 0.8)], ids=["none", "int8", "nf4"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_activations_of_16_bits_add_little(dtype: torch.dtype, quantization: Quantization, least: float) -> None:
    decoder = decoder_of("internvl2-4b-tiny", quantization, dtype)  # the least near of the eleven
    assert decoder.dtype == dtype
    assert cosines("internvl2-4b-tiny", decoder).min() > least


@pytest.mark.parametrize("quantization", BITS)
@pytest.mark.parametrize("checkpoint", ["internvl3-8b-tiny", "internvl3-9b-tiny", "internvl2-26b-tiny"])
def test_a_quantized_model_is_the_model_of_the_rounded_weights(checkpoint: str, quantization: Quantization) -> None:
    """Whatever rounding loses, nothing else is lost: with biases, with fused and with grouped rows."""
    directory = GOLDEN / "checkpoints" / checkpoint
    scheme = scheme_of(quantization)
    assert scheme
    rounded = load_decoder(directory, read_config(directory), LoadSettings(CPU, torch.float32))
    for name, weight in rounded.named_parameters():
        if name.startswith("layers.") and weight.ndim == 2:
            memory = scheme.empty(*weight.shape, CPU)
            scheme.round(weight, *memory)
            # What the matrix that is kept makes of the unit vectors is the matrix itself.
            weight.data = scheme.multiply(torch.eye(weight.shape[1]), *memory, None).t().contiguous()
    prompt = PromptTokens(tuple(range(1, 90)))
    expected = prompt_logits(rounded, prompt)
    torch.testing.assert_close(prompt_logits(decoder_of(checkpoint, quantization), prompt), expected, atol=1e-4, rtol=0)


def test_what_is_kept_whole_is_all_but_the_layers_matrices() -> None:
    whole, narrow = decoder_of("internvl3-8b-tiny", "none"), decoder_of("internvl3-8b-tiny", "int8")
    gone = dict(whole.named_parameters()).keys() - dict(narrow.named_parameters()).keys()
    matrices = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
    assert gone == {f"layers.{layer}.{name}.weight" for layer in range(3) for name in matrices}
    for name, weight in narrow.named_parameters():
        assert torch.equal(weight, whole.get_parameter(name)), name


@pytest.mark.parametrize("quantization", BITS)
async def test_a_quantized_service_generates(quantization: Quantization) -> None:
    settings = LlmSettings(
        model=GOLDEN / "checkpoints/internvl2-8b-tiny",
        quantization=quantization,
        dtype="bfloat16",
        kv_cache_bytes=8 << 20,
    )
    engine = LoadedModel(settings).engine()
    engine.start()
    try:
        request = EngineRequest(PromptTokens(tuple(range(5, 70))), (), SamplingParams(max_output_tokens=10))
        outputs = [output async for output in each(engine.generate(request))]
    finally:
        engine.stop()
    assert len([output for output in outputs if isinstance(output, TokenOutput)]) == 10


_MEASURE = """
import json, sys
from pathlib import Path
import torch
from shared.checkpoint import read_config
from shared.quantize import scheme_of
from llm_service.model.loader import LoadSettings, load_decoder

def kib(key):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0])

directory, quantization = Path(sys.argv[1]), sys.argv[2]
scheme, cpu = scheme_of(quantization), torch.device("cpu")
scheme.round(torch.ones(2, 64, dtype=torch.bfloat16), *scheme.empty(2, 64, cpu))  # loads the library
before = kib("VmRSS")
decoder = load_decoder(directory, read_config(directory), LoadSettings(cpu, torch.bfloat16, quantization))
print(json.dumps({
    "peak": (kib("VmHWM") - before) * 1024, "after": (kib("VmRSS") - before) * 1024, "kept": decoder.weight_bytes
}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of 120 million numbers, nearly all of them in the layers' matrices."""
    directory = tmp_path_factory.mktemp("large") / "model"
    directory.mkdir()
    raw = json.loads((GOLDEN / "checkpoints/internvl2-8b-tiny/config.json").read_text())
    raw["llm_config"] |= {"hidden_size": 1024, "num_hidden_layers": 8, "intermediate_size": 4096, "vocab_size": 500}
    raw["llm_config"] |= {"num_attention_heads": 16, "num_key_value_heads": 4}
    (directory / "config.json").write_text(json.dumps(raw))
    decoder = empty_decoder(decoder_config(raw["llm_config"]))
    plan = weight_plan(decoder.config, shapes_of(decoder), FAMILIES["InternLM2ForCausalLM"], Naming.ORIGINAL)
    generator = torch.Generator().manual_seed(1)
    save_file(
        {
            part.name: torch.empty(part.shape, dtype=torch.bfloat16).uniform_(-0.1, 0.1, generator=generator)
            for parts in plan.values()
            for part in parts
        },
        directory / "model.safetensors",
    )
    return directory


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
@pytest.mark.parametrize(("quantization", "part"), [("int8", 0.51), ("nf4", 0.29)])
def test_memory_is_that_of_the_bits_and_no_more_while_loading(
    large: Path, quantization: Quantization, part: float
) -> None:
    command = [sys.executable, "-c", _MEASURE, str(large), quantization]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    stored = (large / "model.safetensors").stat().st_size
    assert found["kept"] < part * stored
    assert found["after"] < found["kept"] + (64 << 20)
    # One matrix of 16 MiB, pieces of it, and the library's modules; far from a second copy of the weights.
    assert found["peak"] < found["kept"] + (96 << 20) < stored
