"""Makes a wider and deeper model that answers as a smaller one does, so that nothing need be learned again.

Function-preserving growth (Chen, Goodfellow, Shlens: Net2Net, 2015). New parts of the residual stream begin at zero,
because nothing writes to them; what reads them is drawn at random. New heads, new units of an MLP and new layers read
at random, and what they write is zero. So nothing changes at first, and everything new has gradients.
"""

import torch
from torch import nn

from examples.nano.model import Nano
from llm_service.model.decoder import DecoderLayer


@torch.no_grad()
def grown(small: Nano, large: Nano) -> Nano:
    """Fill `large`, which has just been drawn, such that it computes what `small` does; return it.

    The vision transformers have to be alike; heads have to have one size. Raises `ValueError` if they do not.
    """
    if small.tower.config.vit != large.tower.config.vit:
        raise ValueError("Only the language model can grow; the vision transformers have to be alike.")
    if small.decoder.config.head_dim != large.decoder.config.head_dim:
        raise ValueError("Only more heads can be added; their size has to stay.")
    large.tower.vision_model.load_state_dict(small.tower.vision_model.state_dict())
    norm, first, _, second = small.tower.mlp1
    large.tower.mlp1[0].load_state_dict(norm.state_dict())
    _copy_into(large.tower.mlp1[1], first)
    _copy_into(large.tower.mlp1[3], second, writes=True, inner=True)
    _copy_into(large.decoder.embed, small.decoder.embed, inner=True)
    _copy_into(large.decoder.head, small.decoder.head)
    _grow_norm(large.decoder.norm.weight, small.decoder.norm.weight)
    layers = zip(small.decoder.layers, large.decoder.layers, strict=False)
    for old, new in layers:
        assert isinstance(old, DecoderLayer)
        assert isinstance(new, DecoderLayer)
        _grow_layer(small, large, old, new)
    for new in list(large.decoder.layers)[len(small.decoder.layers) :]:
        assert isinstance(new, DecoderLayer)
        new.attention.out.weight.zero_()
        new.mlp.down.weight.zero_()
    return large


def _grow_layer(small: Nano, large: Nano, old: DecoderLayer, new: DecoderLayer) -> None:
    _grow_norm(new.attention_norm.weight, old.attention_norm.weight)
    _grow_norm(new.mlp_norm.weight, old.mlp_norm.weight)
    columns = old.attention.qkv.in_features
    starts = zip(_starts(small.decoder.config.qkv_rows), _starts(large.decoder.config.qkv_rows), strict=True)
    for (source, target), rows in zip(starts, small.decoder.config.qkv_rows, strict=True):
        new.attention.qkv.weight[target : target + rows, :columns] = old.attention.qkv.weight[source : source + rows]
        if old.attention.qkv.bias is not None:
            new.attention.qkv.bias[target : target + rows] = old.attention.qkv.bias[source : source + rows]
    old_units, new_units = old.mlp.down.in_features, new.mlp.down.in_features
    for half in (0, 1):  # gate, up
        target, source = half * new_units, half * old_units
        rows = slice(target, target + old_units)
        new.mlp.gate_up.weight[rows, :columns] = old.mlp.gate_up.weight[source : source + old_units]
    _copy_into(new.attention.out, old.attention.out, writes=True, inner=True)
    _copy_into(new.mlp.down, old.mlp.down, writes=True, inner=True)


def _copy_into(new: nn.Module, old: nn.Module, *, writes: bool = False, inner: bool = False) -> None:
    """Copy a weight, and its bias, into the first rows and columns of a larger one.

    With `writes` its new rows are zero, with `inner` its new columns.
    """
    target: torch.Tensor = new.weight  # type: ignore[assignment]
    source: torch.Tensor = old.weight  # type: ignore[assignment]
    rows, columns = source.shape
    if writes:
        target[rows:] = 0
    if inner:
        target[:, columns:] = 0
    target[:rows, :columns] = source
    bias = getattr(old, "bias", None)
    if bias is not None:
        new.bias[:rows] = bias  # type: ignore[index,operator]


def _grow_norm(new: torch.Tensor, old: torch.Tensor) -> None:
    """Make up for the zeros that the mean square is taken over."""
    new[: len(old)] = old * (len(old) / len(new)) ** 0.5


def _starts(sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    return 0, sizes[0], sizes[0] + sizes[1]
