"""What `internvl bench` shows and writes: a line per workload, and all of its figures as JSON."""

from collections.abc import Sequence
from typing import Any, Final

from rich.console import Console

from internvl_client.bench import Spread, Summary, Workload

Measured = list[tuple[Workload, Summary]]
HEADINGS: Final = ("first token s", "per token ms", "longest gap ms", "requests/s", "tokens/s")
_WIDTHS: Final = (11, 18, 18, 16, 18, 22)


def show_summaries(console: Console, measured: Measured, rounds: int, seed: int) -> None:
    """Print a line per workload, and one for the turns of its dialogues or its failures where it has any."""
    console.print(_row(["", *HEADINGS]), style="bold")
    for workload, summary in measured:
        console.print(_row([workload.name, *cells_of(summary)]))
        if workload.turns > 1:
            turns = ", ".join(map(text_of, summary.turn_ttft_s))
            console.print(_row(["", f"first token by turn, s: {turns}"]))
        for failure, count in summary.failures.items():
            console.print(_row(["", f"{count} of {summary.num_asked} failed: {failure}"]))
    console.print(f"Median [least-most] of {rounds} rounds. The same questions again: --seed {seed}", style="dim")


def figures(measured: Measured, rounds: int, seed: int) -> dict[str, Any]:
    """Return what is written as JSON."""
    workloads = [{"workload": workload.to_json(), "summary": summary.to_json()} for workload, summary in measured]
    return {"seed": seed, "rounds": rounds, "workloads": workloads}


def cells_of(summary: Summary) -> tuple[str, ...]:
    """Return the cells of a workload's line."""
    return (
        text_of(summary.ttft_s),
        text_of(summary.tpot_s, 1e3, 1),
        text_of(summary.gap_s, 1e3, 0),
        text_of(summary.requests_per_s),
        text_of(summary.output_tokens_per_s, 1, 1),
    )


def text_of(spread: Spread | None, scale: float = 1.0, digits: int = 2) -> str:
    """Return a spread, or "-" where there is none."""
    return spread.text(scale, digits) if spread else "-"


def _row(cells: Sequence[str]) -> str:
    return "".join(f"{cell:<{width}}" for cell, width in zip(cells, _WIDTHS, strict=False)).rstrip()
