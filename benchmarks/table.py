"""Cells of the tables that benchmarks print."""

from collections.abc import Iterable

from internvl_client.bench import Spread


def text(spread: Spread | None, scale: float = 1.0, digits: int = 2) -> str:
    """Return a spread, or "-" where there is none."""
    return spread.text(scale, digits) if spread else "-"


def text_of_all(values: Iterable[float | None], scale: float = 1.0, digits: int = 2) -> str:
    """Return the spread of values."""
    return text(Spread.of(values), scale, digits)
