"""Which layers of a language model go to which of several devices."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf, prod

import torch

from shared.errors import CheckpointError
from shared.quantize import Scheme

_SHARED = 0.5  # of the first device, where the vision tower is on it too


@dataclass(frozen=True, slots=True)
class WeightSizes:
    """Bytes of each layer's weights, and of all that is in no layer: embeddings, norm and head."""

    layers: tuple[int, ...]
    outside: int

    @property
    def total(self) -> int:
        """Bytes of all weights."""
        return sum(self.layers) + self.outside


def weight_sizes(
    shapes: Mapping[str, tuple[int, ...]], num_layers: int, itemsize: int, scheme: Scheme | None
) -> WeightSizes:
    """Return what a decoder's weights take, given by name with their shapes; the scheme is for the layers' matrices."""
    layers, outside = [0] * num_layers, 0
    for name, shape in shapes.items():
        layer = layer_of(name)
        if layer is None:
            outside += prod(shape) * itemsize
        elif scheme and len(shape) == 2:
            layers[layer] += scheme.size_bytes(*shape)
        else:
            layers[layer] += prod(shape) * itemsize
    return WeightSizes(tuple(layers), outside)


def layer_of(name: str) -> int | None:
    """Return the layer that a decoder's weight belongs to by its name; None where it belongs to none."""
    kind, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if kind == "layers" else None


def plan_placement(
    sizes: WeightSizes, free_bytes: Sequence[float], *, vit_shares_first: bool = False
) -> tuple[int, ...]:
    """Return the index of the device of each layer, for devices with so much free memory.

    The first and the last layer are on the first device, with all that is in no layer: there a step begins and ends.
    The layers between follow one another from device to device. Of all such plans this is the one that fills the
    devices most evenly, each measured by its memory; the first counts as half where the vision tower shares it. Raises
    `CheckpointError` where the weights do not fit.
    """
    room = [free * (_SHARED if vit_shares_first and device == 0 else 1) for device, free in enumerate(free_bytes)]
    ends = sizes.layers[:1] + sizes.layers[1:][-1:]
    middle = sizes.layers[1:-1]
    before = [0, *accumulate(middle)]  # bytes of the middle layers before each
    # best[n]: cost and ends of the runs of the first n middle layers on the devices so far.
    best: list[tuple[float, tuple[int, ...]]] = [
        (_unevenness(sizes.outside + sum(ends) + size, room[0]), (count,)) for count, size in enumerate(before)
    ]
    for own in room[1:]:
        best = [
            min(
                (best[start][0] + _unevenness(before[count] - before[start], own), (*best[start][1], count))
                for start in range(count + 1)
            )
            for count in range(len(before))
        ]
    cost, runs = best[-1]
    if cost == inf:
        raise CheckpointError(_no_room(sizes, room))
    return (0, *(bisect_right(runs, index) for index in range(len(middle))), 0)[: len(sizes.layers)]


def place_layers(
    sizes: WeightSizes, devices: Sequence[torch.device], *, vit_shares_first: bool
) -> tuple[torch.device, ...]:
    """Return the device of each layer, by the memory that is free now on the devices.

    Raises `CheckpointError` where the weights do not fit, and for devices that cannot be used together.
    """
    gpus = [device.index or 0 for device in devices if device.type == "cuda"]
    if gpus and len(gpus) < len(devices):
        raise CheckpointError("--devices: a model cannot be on GPUs and elsewhere.")
    if len(set(gpus)) < len(gpus):
        raise CheckpointError("--devices names a GPU twice.")
    plan = plan_placement(sizes, [free_bytes(device, sizes) for device in devices], vit_shares_first=vit_shares_first)
    return tuple(devices[index] for index in plan)


def free_bytes(device: torch.device, sizes: WeightSizes) -> int:
    """Return the free memory of a GPU; of a CPU, which gains nothing by a division, more than the weights take."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2 * sizes.total


def _unevenness(size: int, room: float) -> float:
    """Return a cost whose sum over devices is least where all are equally full; infinite where there is no room."""
    if size > room:
        return inf
    return size * size / room if size else 0.0


def _no_room(sizes: WeightSizes, room: Sequence[float]) -> str:
    parts = ", ".join(f"{part / 2**30:.1f}" for part in room)
    return f"--devices: the weights take {sizes.total / 2**30:.1f} GiB, layer by layer; there is room for {parts} GiB."
