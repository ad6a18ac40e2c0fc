"""Puts a model's weights together from the tensors of a checkpoint: the plan, its check, and the reading in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

from shared.checkpoint import Checkpoint
from shared.errors import CheckpointError
from shared.progress import ProgressLog

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a checkpoint within a weight: its name, its shape, and the runs of rows that its rows fill."""

    name: str
    shape: tuple[int, ...]
    runs: tuple[range, ...]


# The parts of every weight, by the weight's name in the model. Together they fill it.
WeightPlan = Mapping[str, tuple[Part, ...]]


def stacked(names: Iterable[str], rows: Iterable[int], row_shape: tuple[int, ...]) -> tuple[Part, ...]:
    """Return the parts of a weight that holds tensors one below the other, with so many rows each."""
    parts, start = [], 0
    for name, count in zip(names, rows, strict=True):
        parts.append(Part(name, (count, *row_shape), (range(start, start + count),)))
        start += count
    return tuple(parts)


def check(checkpoint: Checkpoint, plan: WeightPlan) -> None:
    """Raise `CheckpointError` naming a tensor of the plan that the checkpoint lacks or has in another shape or type."""
    for part in chain.from_iterable(plan.values()):
        checkpoint.require([part.name])
        entry = checkpoint.entries[part.name]
        if entry.shape != part.shape:
            raise CheckpointError(
                f"{entry.file}: tensor {part.name!r} has the shape {list(entry.shape)}, "
                f"config.json asks for {list(part.shape)}."
            )


def unclaimed(checkpoint: Checkpoint, plan: WeightPlan, prefixes: tuple[str, ...]) -> list[str]:
    """Return the checkpoint's tensors under the prefixes that the plan has no place for."""
    claimed = {part.name for part in chain.from_iterable(plan.values())}
    return [name for name in checkpoint.entries if name.startswith(prefixes) and name not in claimed]


def read_weights(
    checkpoint: Checkpoint,
    plan: WeightPlan,
    new_weight: Callable[[str], torch.Tensor],
    event: str,
    seen: Callable[[str, torch.Tensor], None] = lambda name, piece: None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every weight of a plan by name, filled, in the order in which the shards hold them.

    `new_weight` makes the empty tensor, on the device and in the float type that it shall have. Besides the weights
    this takes the memory of one piece, some megabytes. `seen` is called with the weight's name and every piece as
    stored, in order; a piece is valid during the call. Progress is logged as `event`. Raises what `check` raises.
    """
    check(checkpoint, plan)
    names = [part.name for part in chain.from_iterable(plan.values())]
    progress = ProgressLog(event, len(names), sum(checkpoint.entries[name].size_bytes for name in names))
    for name in sorted(plan, key=lambda name: _place(checkpoint, plan[name])):
        weight = new_weight(name)
        for part in plan[name]:
            done = 0
            for piece in checkpoint.pieces(part.name):
                seen(name, piece)
                _write(weight, part.runs, done, piece)
                done += len(piece)
                progress.add(piece.nbytes)
            progress.add_tensors(1)
        yield name, weight


def _place(checkpoint: Checkpoint, parts: tuple[Part, ...]) -> tuple[str, int]:
    entry = checkpoint.entries[parts[0].name]
    return entry.file.name, entry.begin


def _write(weight: torch.Tensor, runs: tuple[range, ...], done: int, piece: torch.Tensor) -> None:
    if len(runs) == 1:
        begin = runs[0].start + done
        weight[begin : begin + len(piece)].copy_(piece)
        return
    import torch

    rows = torch.tensor(list(islice(chain.from_iterable(runs), done, done + len(piece))), device=weight.device)
    weight.index_copy_(0, rows, piece.to(weight.device, weight.dtype))
