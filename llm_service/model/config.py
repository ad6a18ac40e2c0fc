"""The shape of a language model, read from a checkpoint's `llm_config`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: base frequency, and what changes for long sequences.

    `dynamic` (NTK) applies `factor` past `max_positions`. `longrope` divides the frequencies by `short_factors`, past
    `original_max_positions` by `long_factors`, and multiplies cos and sin by `amplitude`, long or not.
    """

    theta: float
    kind: str
    factor: float
    max_positions: int
    original_max_positions: int = 0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @property
    def plain_limit(self) -> int:
        """The longest sequence that is rotated as a short one, where length matters at all."""
        return self.max_positions if self.kind == "dynamic" else self.original_max_positions

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by."""
        if self.kind != "longrope" or self.max_positions <= self.original_max_positions:
            return 1.0
        original = self.original_max_positions
        return math.sqrt(1 + math.log(self.max_positions / original) / math.log(original))


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A pre-norm decoder with grouped-query attention and a gated MLP."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    rope: RopeConfig

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of q, k and v in the fused projection."""
        return self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.num_kv_heads * self.head_dim


def architecture_of(llm: Mapping[str, Any]) -> str:
    """Return the name of the language model's class, or raise `CheckpointError` if it is not supported."""
    architecture = str(next(iter(llm.get("architectures") or ()), ""))
    if architecture not in _BIASES:
        supported = ", ".join(_BIASES)
        raise CheckpointError(f"language model {architecture!r} is not supported; supported are {supported}.")
    return architecture


def decoder_config(llm: Mapping[str, Any]) -> DecoderConfig:
    """Return the shape that an `llm_config` describes, or raise `CheckpointError` for one that is not supported."""
    architecture = architecture_of(llm)
    _refuse_unsupported(llm)
    try:
        heads, hidden = int(llm["num_attention_heads"]), int(llm["hidden_size"])
        qkv_bias, out_bias, mlp_bias = _BIASES[architecture](llm)
        head_dim = int(llm.get("head_dim") or hidden // heads)
        return DecoderConfig(
            hidden_size=hidden,
            num_layers=int(llm["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(llm.get("num_key_value_heads") or heads),
            head_dim=head_dim,
            intermediate_size=int(llm["intermediate_size"]),
            vocab_size=int(llm["vocab_size"]),
            norm_eps=float(llm["rms_norm_eps"]),
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            mlp_bias=mlp_bias,
            rope=_rope_config(llm, head_dim),
        )
    except KeyError as error:
        raise CheckpointError(f"llm_config in config.json has no {error.args[0]!r}.") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"llm_config in config.json has a value of the wrong type: {error}.") from None


_Biases = tuple[bool, bool, bool]  # of q, k and v; of the attention's output; of the MLP


def _llama_biases(llm: Mapping[str, Any]) -> _Biases:
    attention = bool(llm.get("attention_bias"))
    return attention, attention, bool(llm.get("mlp_bias"))


def _internlm2_biases(llm: Mapping[str, Any]) -> _Biases:
    attention = bool(llm.get("bias"))
    return attention, attention, False


def _internlm3_biases(llm: Mapping[str, Any]) -> _Biases:
    return bool(llm.get("qkv_bias")), bool(llm.get("bias")), bool(llm.get("bias"))


_BIASES: Mapping[str, Callable[[Mapping[str, Any]], _Biases]] = {
    "Qwen2ForCausalLM": lambda llm: (True, False, False),
    "LlamaForCausalLM": _llama_biases,
    "InternLM2ForCausalLM": _internlm2_biases,
    "InternLM3ForCausalLM": _internlm3_biases,
    "Phi3ForCausalLM": lambda llm: (False, False, False),
}


def _refuse_unsupported(llm: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for settings that would change what is computed and that no released model has."""
    if llm.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"hidden_act {llm['hidden_act']!r} in llm_config is not supported.")
    if llm.get("use_sliding_window"):
        raise CheckpointError("use_sliding_window in llm_config is not supported.")
    if llm.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError("partial_rotary_factor in llm_config is not supported.")


def _rope_config(llm: Mapping[str, Any], head_dim: int) -> RopeConfig:
    # One dictionary in files written by recent libraries, two keys in all others.
    rope = llm.get("rope_parameters") or {"rope_theta": llm["rope_theta"], **(llm.get("rope_scaling") or {})}
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    if kind == "su":  # what "longrope" was called first
        kind = "longrope"
    if kind not in ("default", "dynamic", "longrope"):
        raise CheckpointError(f"rope_scaling {kind!r} in llm_config is not supported.")
    config = RopeConfig(
        theta=float(rope["rope_theta"]),
        kind=kind,
        factor=float(rope.get("factor") or 1.0),
        max_positions=int(llm["max_position_embeddings"]),
    )
    return _long_rope(config, llm, rope, head_dim) if kind == "longrope" else config


def _long_rope(config: RopeConfig, llm: Mapping[str, Any], rope: Mapping[str, Any], head_dim: int) -> RopeConfig:
    original = rope.get("original_max_position_embeddings") or llm["original_max_position_embeddings"]
    short, long = (tuple(map(float, rope[key])) for key in ("short_factor", "long_factor"))
    if {len(short), len(long)} != {head_dim // 2} or int(original) < 2:
        raise CheckpointError("rope_scaling in llm_config has not one factor for every pair of a head's dimensions.")
    return RopeConfig(config.theta, config.kind, config.factor, config.max_positions, int(original), short, long)
