"""What is wrong with a language model's files is said by name, and nothing in them is run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_service.model.decoder import Decoder
from llm_service.model.loader import LoadSettings, load_decoder
from llm_service.prompt.splice import PromptTokens
from llm_service.prompt.tokenizer import load_tokenizer
from shared.checkpoint import Checkpoint, read_config
from shared.errors import CheckpointError
from tests.golden_cases import GOLDEN
from tests.golden_models import CPU, prompt_logits
from vision_service.model.loader import load_tower
from vision_service.model.tower import TowerConfig

TINY = GOLDEN / "checkpoints/internvl3-8b-tiny"
GATE = "language_model.model.layers.1.mlp.gate_proj.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return copied("internvl3-8b-tiny", tmp_path)


def copied(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "checkpoints" / name, tmp_path / "model", copy_function=shutil.copyfile))


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_decoder(directory, read_config(directory), LoadSettings(CPU, dtype))


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")


def change_llm(directory: Path, **values: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["llm_config"] |= values
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_16_bits_stays_near_the_one_of_32(dtype: torch.dtype) -> None:
    decoder = load(TINY, dtype)
    assert {parameter.dtype for parameter in decoder.parameters()} == {dtype}
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in decoder.parameters())
    assert not decoder.training
    prompt = PromptTokens(tuple(range(40)))
    narrow, wide = prompt_logits(decoder, prompt), prompt_logits(load(TINY), prompt)
    assert narrow.dtype == torch.float32
    assert torch.cosine_similarity(narrow.flatten(), wide.flatten(), dim=0) > 0.999


def test_a_missing_tensor_is_named(checkpoint: Path) -> None:
    change_weights(checkpoint, lambda weights: weights.pop(GATE))
    with pytest.raises(CheckpointError, match=GATE):
        load(checkpoint)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(checkpoint: Path) -> None:
    change_weights(checkpoint, lambda weights: weights.update({GATE: torch.zeros(3, 5)}))
    with pytest.raises(CheckpointError, match=rf"{GATE}.*\[3, 5\].*\[\d+, 64\]"):
        load(checkpoint)


def test_a_tensor_that_config_json_does_not_speak_of_is_named(checkpoint: Path) -> None:
    name = "language_model.model.layers.1.self_attn.o_proj.bias"
    change_weights(checkpoint, lambda weights: weights.update({name: torch.zeros(64)}))
    with pytest.raises(CheckpointError, match=name):
        load(checkpoint)


def test_a_ropes_frequencies_in_an_old_file_are_not_needed(checkpoint: Path) -> None:
    name = "language_model.model.layers.1.self_attn.rotary_emb.inv_freq"
    change_weights(checkpoint, lambda weights: weights.update({name: torch.zeros(8)}))
    load(checkpoint)


def test_fewer_layers_in_config_json_than_in_the_file_are_an_error(checkpoint: Path) -> None:
    change_llm(checkpoint, num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"layers\.2\."):
        load(checkpoint)


def test_the_biases_of_internlm2_are_split_like_its_weights(tmp_path: Path) -> None:
    directory = copied("internvl3-9b-tiny", tmp_path)  # 8 heads, 1 of keys and values
    change_llm(directory, bias=True)
    weights = load_file(directory / "model.safetensors")
    prefix = "language_model.model.layers.0.attention"
    rows = weights[f"{prefix}.wqkv.weight"].shape[0]
    for layer in range(3):
        name = f"language_model.model.layers.{layer}.attention"
        weights[f"{name}.wqkv.bias"] = torch.arange(float(rows))
        weights[f"{name}.wo.bias"] = torch.ones(64)
    # A weight's first column names its rows, so that weight and bias can be compared after the split.
    weights[f"{prefix}.wqkv.weight"][:, 0] = torch.arange(float(rows))
    save_file(weights, directory / "model.safetensors")
    attention = load(directory).layers[0].get_submodule("attention")
    assert torch.equal(attention.qkv.weight[:, 0], attention.qkv.bias)
    assert torch.equal(attention.qkv.bias.sort().values, torch.arange(float(rows)))
    assert torch.equal(attention.out.bias, torch.ones(64))


def test_internlm3_with_biases_everywhere_computes_what_the_librarys_llama_computes(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,  # not hidden_size / num_attention_heads
        "intermediate_size": 48,
        "vocab_size": 90,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    library = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope, attention_bias=True, mlp_bias=True)).eval()
    for parameter in library.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    directory = copied("internlm3-tiny", tmp_path)
    change_llm(directory, **shape, rope_theta=10000.0, rope_scaling=None, qkv_bias=True, bias=True)
    tensors = {f"language_model.{name}": tensor.clone() for name, tensor in library.state_dict().items()}
    save_file(tensors, directory / "model.safetensors")
    ids = tuple(range(50))
    with torch.inference_mode():
        expected = library(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(prompt_logits(load(directory), PromptTokens(ids)), expected, atol=1e-4, rtol=1e-4)


def test_code_in_a_checkpoint_is_never_run(checkpoint: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'w')\n"
    exec(code)  # what is planted does leave a mark where it is run
    assert mark.exists()
    mark.unlink()
    modules = ("configuration_internvl_chat", "modeling_internvl_chat", "configuration_qwen2", "tokenization_internvl")
    for module in modules:
        (checkpoint / f"{module}.py").write_text(code)
    (checkpoint / "__init__.py").write_text(code)
    for file, auto_map in {
        "config.json": {
            "AutoConfig": f"{modules[0]}.InternVLChatConfig",
            "AutoModel": f"{modules[1]}.InternVLChatModel",
        },
        "tokenizer_config.json": {"AutoTokenizer": [f"{modules[3]}.InternVLTokenizer", None]},
    }.items():
        content = json.loads((checkpoint / file).read_text())
        (checkpoint / file).write_text(json.dumps(content | {"auto_map": auto_map}))
    change_llm(checkpoint, auto_map={"AutoConfig": f"{modules[2]}.Qwen2Config"})
    config = read_config(checkpoint)
    load(checkpoint)
    load_tower(Checkpoint(checkpoint), TowerConfig.of(config), CPU, torch.float32)
    load_tokenizer(checkpoint)
    assert not mark.exists()
