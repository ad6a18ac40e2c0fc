"""The shape of a language model, read from a checkpoint's `llm_config`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import CheckpointError

# Architectures whose tensors have Llama's names; the value says whether q, k and v have biases.
QKV_BIAS: Mapping[str, bool] = {"Qwen2ForCausalLM": True, "LlamaForCausalLM": False}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: base frequency, and for `dynamic` (NTK) the factor that applies past `max_positions`."""

    theta: float
    kind: str
    factor: float
    max_positions: int


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
    rope: RopeConfig

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of q, k and v in the fused projection."""
        return self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.num_kv_heads * self.head_dim


def decoder_config(llm: Mapping[str, Any]) -> DecoderConfig:
    """Return the shape that an `llm_config` describes, or raise `CheckpointError` for one that is not supported."""
    architecture = next(iter(llm.get("architectures") or ()), "")
    if architecture not in QKV_BIAS:
        supported = ", ".join(QKV_BIAS)
        raise CheckpointError(f"language model {architecture!r} is not supported; supported are {supported}.")
    try:
        heads, hidden = int(llm["num_attention_heads"]), int(llm["hidden_size"])
        return DecoderConfig(
            hidden_size=hidden,
            num_layers=int(llm["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(llm.get("num_key_value_heads") or heads),
            head_dim=int(llm.get("head_dim") or hidden // heads),
            intermediate_size=int(llm["intermediate_size"]),
            vocab_size=int(llm["vocab_size"]),
            norm_eps=float(llm["rms_norm_eps"]),
            qkv_bias=QKV_BIAS[architecture],
            rope=_rope_config(llm),
        )
    except KeyError as error:
        raise CheckpointError(f"llm_config in config.json has no {error.args[0]!r}.") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"llm_config in config.json has a value of the wrong type: {error}.") from None


def _rope_config(llm: Mapping[str, Any]) -> RopeConfig:
    scaling = llm.get("rope_scaling") or {}
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    if kind not in ("default", "dynamic"):
        raise CheckpointError(f"rope_scaling {kind!r} in llm_config is not supported.")
    return RopeConfig(
        theta=float(llm["rope_theta"]),
        kind=kind,
        factor=float(scaling.get("factor", 1.0)),
        max_positions=int(llm["max_position_embeddings"]),
    )
