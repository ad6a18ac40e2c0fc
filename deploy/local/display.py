"""Shows how far the parts of a starting system are: live on a terminal, a line per change elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from deploy.local.stack import PartState, Report


@contextmanager
def showing_progress(console: Console) -> Iterator[Report]:
    """Yield what a stack reports to."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    with Live(console=console, refresh_per_second=10) as live:
        board = _Board()
        yield lambda states: live.update(board.table(states))


class _Lines:
    """Prints a part's state when it changes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[str, str] = {}

    def __call__(self, states: Sequence[PartState]) -> None:
        for state in states:
            if self._shown.get(state.name) != state.state:
                self._shown[state.name] = state.state
                self._console.print(f"  {state.name:<13} {state.state:<8} {state.seconds:5.1f} s")


class _Board:
    """Draws all states; keeps the spinners, so that they turn."""

    def __init__(self) -> None:
        self._spinners: dict[str, Spinner] = {}

    def table(self, states: Sequence[PartState]) -> Table:
        table = Table.grid(padding=(0, 1))
        for state in states:
            spinner = self._spinners.setdefault(state.name, Spinner("dots", style="cyan"))
            mark = Text("✓", style="green") if state.state == "ready" else spinner
            table.add_row("", mark, state.name, state.state, f"{state.seconds:5.1f} s", state.note)
        return table
