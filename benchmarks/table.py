"""Cells of the tables that benchmarks print."""

from collections.abc import Iterable

from internvl_client.bench import Spread
from internvl_client.cli_bench_output import text_of


def text_of_all(values: Iterable[float | None], scale: float = 1.0, digits: int = 2) -> str:
    """Return the spread of values."""
    return text_of(Spread.of(values), scale, digits)
