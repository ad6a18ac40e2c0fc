"""Small helpers for drawing lots. All randomness of the world comes from one numpy Generator per situation."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

ItemT = TypeVar("ItemT")
Rng = np.random.Generator


def generator(*key: int) -> Rng:
    """Return the generator that belongs to a key: the same key always gives the same numbers."""
    return np.random.default_rng(key)


def pick(rng: Rng, items: Sequence[ItemT]) -> ItemT:
    """Return one of the items."""
    return items[int(rng.integers(len(items)))]


def shuffled(rng: Rng, items: Sequence[ItemT]) -> list[ItemT]:
    """Return the items in any order."""
    return [items[int(index)] for index in rng.permutation(len(items))]


def weighted(rng: Rng, weights: Sequence[float]) -> int:
    """Return an index, chosen in proportion to its weight."""
    point = rng.random() * sum(weights)
    for index, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return index
    return len(weights) - 1


def between(rng: Rng, bounds: tuple[float, float]) -> float:
    """Return a number between two bounds."""
    low, high = bounds
    return low + (high - low) * rng.random()


def chance(rng: Rng, probability: float) -> bool:
    """Return true as often as `probability` says."""
    return bool(rng.random() < probability)
