"""Which tensors of a checkpoint make up the tower's weights, for every naming."""

from collections.abc import Mapping

from shared.checkpoint import Naming
from shared.weights import Part, WeightPlan, stacked

# What the vision side's tensors begin with; nothing else in a checkpoint does.
PREFIXES: Mapping[Naming, tuple[str, ...]] = {
    Naming.ORIGINAL: ("vision_model.", "mlp1."),
    Naming.HF: ("vision_tower.", "multi_modal_projector."),
    Naming.HF_NATIVE: ("model.vision_tower.", "model.multi_modal_projector."),
}
# The original layout's words and what the `-hf` layout says instead.
_HF_WORDS = (
    ("vision_model.", "vision_tower."),
    (".class_embedding", ".cls_token"),
    (".position_embedding", ".position_embeddings"),
    (".patch_embedding.", ".patch_embeddings.projection."),
    (".encoder.layers.", ".encoder.layer."),
    (".attn.", ".attention."),
    (".attention.proj.", ".attention.projection_layer."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".ls1", ".lambda_1"),
    (".ls2", ".lambda_2"),
    ("mlp1.0.", "multi_modal_projector.layer_norm."),
    ("mlp1.1.", "multi_modal_projector.linear_1."),
    ("mlp1.3.", "multi_modal_projector.linear_2."),
)


def weight_plan(shapes: Mapping[str, tuple[int, ...]], naming: Naming) -> WeightPlan:
    """Return the parts of each of a tower's weights, which are given by name with their shapes."""
    return {name: _parts(name, shape, naming) for name, shape in shapes.items()}


def _parts(name: str, shape: tuple[int, ...], naming: Naming) -> tuple[Part, ...]:
    tensors = [name]
    if naming is not Naming.ORIGINAL:
        tensors = [_hf_name(tensor, naming) for tensor in _thirds(name)]
    return stacked(tensors, [shape[0] // len(tensors)] * len(tensors), shape[1:])


def _thirds(name: str) -> list[str]:
    """Return the names of queries, keys and values where the `-hf` layout has them apart."""
    before, fused, kind = name.partition(".attn.qkv.")
    return [f"{before}.attn.{part}_proj.{kind}" for part in "qkv"] if fused else [name]


def _hf_name(name: str, naming: Naming) -> str:
    for original, other in _HF_WORDS:
        name = name.replace(original, other)
    return f"model.{name}" if naming is Naming.HF_NATIVE else name
