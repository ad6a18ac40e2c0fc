"""Which tensors of a checkpoint make up the decoder's weights, for every family and naming."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from llm_service.model.config import DecoderConfig
from shared.checkpoint import Naming
from shared.weights import Part, WeightPlan, stacked


@dataclass(frozen=True, slots=True)
class Family:
    """A family's names, without what is before and behind: of a layer's tensors, and of embeddings and head.

    `qkv` and `gate_up` hold one name where the file has them fused. `grouped_qkv`: the fused rows come by groups, each
    the queries that share a key, the key, the value.
    """

    embed: str = "model.embed_tokens"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    grouped_qkv: bool = False


LLAMA = Family()
_PHI3 = replace(LLAMA, qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))
_INTERNLM2 = Family(
    embed="model.tok_embeddings",
    head="output",
    attention_norm="attention_norm",
    mlp_norm="ffn_norm",
    qkv=("attention.wqkv",),
    out="attention.wo",
    gate_up=("feed_forward.w1", "feed_forward.w3"),
    down="feed_forward.w2",
    grouped_qkv=True,
)
FAMILIES: Mapping[str, Family] = {
    "Qwen2ForCausalLM": LLAMA,
    "LlamaForCausalLM": LLAMA,
    "InternLM2ForCausalLM": _INTERNLM2,
    "InternLM3ForCausalLM": LLAMA,
    "Phi3ForCausalLM": _PHI3,
}
# What a language model's tensors begin with; nothing else in a checkpoint does.
PREFIXES: Mapping[Naming, tuple[str, ...]] = {
    Naming.ORIGINAL: ("language_model.",),
    Naming.HF: ("language_model.",),
    Naming.HF_NATIVE: ("model.language_model.", "lm_head."),
}
_LAYER_WEIGHT = re.compile(r"layers\.(\d+)\.(?:attention\.|mlp\.)?(\w+)\.(weight|bias)")


def weight_plan(
    config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]], family: Family, naming: Naming
) -> WeightPlan:
    """Return the parts of each of a decoder's weights, which are given by name with their shapes."""
    return {name: _parts(config, name, shape, family, naming) for name, shape in shapes.items()}


def shapes_of(decoder: nn.Module) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of a decoder's weights by name; its weights may be on the meta device."""
    return {name: tuple(weight.shape) for name, weight in decoder.named_parameters()}


def _parts(
    config: DecoderConfig, name: str, shape: tuple[int, ...], family: Family, naming: Naming
) -> tuple[Part, ...]:
    outside = {"embed.weight": family.embed, "norm.weight": "model.norm", "head.weight": family.head}
    if name in outside:
        return stacked([_named(f"{outside[name]}.weight", naming)], shape[:1], shape[1:])
    match = _LAYER_WEIGHT.fullmatch(name)
    assert match, name
    layer, module, kind = match.groups()
    inside: str | tuple[str, ...] = getattr(family, module)
    tensors = [
        _named(f"model.layers.{layer}.{tensor}.{kind}", naming)
        for tensor in ([inside] if isinstance(inside, str) else inside)
    ]
    if module == "qkv" and family.grouped_qkv:
        return (Part(tensors[0], shape, _grouped_runs(config)),)
    rows = {1: shape[:1], 2: (shape[0] // 2,) * 2, 3: config.qkv_rows}[len(tensors)]
    return stacked(tensors, rows, shape[1:])


def _grouped_runs(config: DecoderConfig) -> tuple[range, ...]:
    """Return where the rows of a grouped projection go among all queries, all keys, all values."""
    size = config.head_dim
    shared = config.num_heads // config.num_kv_heads * size  # rows of the queries of a group
    key_start, value_start = config.qkv_rows[0], sum(config.qkv_rows[:2])
    runs = []
    for group in range(config.num_kv_heads):
        runs.append(range(group * shared, (group + 1) * shared))
        runs += [range(start + group * size, start + (group + 1) * size) for start in (key_start, value_start)]
    return tuple(runs)


def _named(tensor: str, naming: Naming) -> str:
    if naming is not Naming.HF_NATIVE:
        return f"language_model.{tensor}"
    return tensor.replace("model.", "model.language_model.", 1) if tensor.startswith("model.") else tensor
