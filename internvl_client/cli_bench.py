"""The command that measures a running system: `internvl bench`."""

import asyncio
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from internvl_client.bench import (
    SCENARIOS,
    GatewayTarget,
    Summary,
    TargetError,
    Workload,
    ask_round,
    calibrate,
    warm_up,
)
from internvl_client.bench.scenarios import DESCRIPTIONS
from internvl_client.cli import CommandFailure
from internvl_client.cli_bench_output import Measured, figures, show_summaries
from internvl_client.cli_gateway import AddressOption, find_address, open_async_client
from internvl_client.cli_output import open_console

_EXAMPLES: Final = """Examples:

  internvl bench

  internvl bench --scenario text1 --rounds 5 --json figures.json

  internvl bench --pictures 1 --picture-size 896x896 --dialogues 32 --concurrency 8
"""
_DEFAULT: Final = ("text1", "single", "same")
_SCENARIO_HELP: Final = "One of " + "; ".join(f"{name}: {text}" for name, text in DESCRIPTIONS.items()) + "."

ScenarioOption = Annotated[
    list[str] | None,
    typer.Option("--scenario", "-s", metavar="NAME", help=f"May be repeated. {_SCENARIO_HELP}"),
]
WorkloadOption = Annotated[
    Path | None,
    typer.Option(
        exists=True, dir_okay=False, help="JSON file of workloads of your own, as --json writes them; or of one."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog=_EXAMPLES)(bench)


def bench(
    scenario: ScenarioOption = None,
    workload: WorkloadOption = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of text in a question, about.")] = None,
    output_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer, exactly.")] = None,
    pictures: Annotated[int | None, typer.Option(min=0, help="New pictures in a dialogue's first question.")] = None,
    picture_size: Annotated[str | None, typer.Option(metavar="WxH", help="In pixels; 448x448 is one tile.")] = None,
    same_pictures: Annotated[
        bool | None, typer.Option("--same-pictures", help="All dialogues of a round are about the same pictures.")
    ] = None,
    asked_before: Annotated[
        bool | None, typer.Option("--asked-before", help="Pictures were asked about once before.")
    ] = None,
    dialogues: Annotated[int | None, typer.Option(min=1, help="Dialogues of a round.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=0, help="Dialogues at a time; 0 is all of them.")] = None,
    rate: Annotated[
        float | None, typer.Option(min=0, help="Dialogues that begin in a second, at random moments.")
    ] = None,
    turns: Annotated[int | None, typer.Option(min=1, help="Questions of a dialogue, one after another.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each workload is asked.")] = 3,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Draws the same questions again; pictures of an earlier run are cached.")
    ] = None,
    warmup: Annotated[bool, typer.Option(help="Ask a few questions first that are not measured.")] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, writable=True, help="Also write the figures to this file.")
    ] = None,
    address: AddressOption = None,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds that one answer may take.")] = 600.0,
) -> None:
    """Measure a running system: waits for the first and for every token, and what it answers in a second.

    Asks questions made for that, about pictures drawn for that, with answers of a given length. Without options: text1,
    single and same. Options about questions change what scenarios ask. Whoever else uses the system waits for it.
    """
    changes = {
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "pictures": pictures,
        "picture_size": _size(picture_size) if picture_size else None,
        "same_pictures": same_pictures,
        "asked_before": asked_before,
        "dialogues": dialogues,
        "concurrency": concurrency,
        "rate_per_s": rate,
        "turns": turns,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    workloads = _workloads(scenario or (), workload, given)
    drawn = random.randrange(2**32) if seed is None else seed  # noqa: S311  nothing is secret here
    console = open_console()
    with _progress_bar(console, workloads, rounds) as on_done:
        measured = asyncio.run(_measure(find_address(address), workloads, rounds, drawn, timeout, warmup, on_done))
    show_summaries(console, measured, rounds, drawn)
    if json_file:
        json_file.write_text(json.dumps(figures(measured, rounds, drawn), indent=1) + "\n", encoding="utf-8")
    _check(measured)


async def _measure(
    address: str,
    workloads: Sequence[Workload],
    rounds: int,
    seed: int,
    timeout_s: float,
    warms_up: bool,
    on_done: Callable[[str], object],
) -> Measured:
    try:
        async with open_async_client(address, timeout_s) as client:
            target = GatewayTarget(client)
            length = await calibrate(target, seed)
            if warms_up:
                await warm_up(target, seed, length)
            measured = []
            for workload in workloads:
                asked = [
                    await ask_round(
                        workload,
                        target,
                        seed=seed,
                        round_index=index,
                        length=length,
                        on_done=lambda name=workload.name: on_done(name),  # type: ignore[misc]
                    )
                    for index in range(rounds)
                ]
                measured.append((workload, Summary.of(asked)))
            return measured
    except TargetError as error:
        raise CommandFailure(str(error)) from None


def _workloads(names: Sequence[str], file: Path | None, changes: dict[str, Any]) -> list[Workload]:
    """Return what is to be asked: named, from a file, or made of the options alone; each with the changes."""
    if unknown := [name for name in names if name not in SCENARIOS]:
        raise CommandFailure(f"there is no scenario {unknown[0]}; there are {', '.join(SCENARIOS)}.")
    bases = [SCENARIOS[name] for name in names]
    try:
        bases += _read(file) if file else []
        if not bases:
            bases = [Workload()] if changes else [SCENARIOS[name] for name in _DEFAULT]
        return [replace(base, **changes) for base in bases]
    except ValueError as error:
        raise CommandFailure(f"that workload cannot be asked. {error}") from None


def _read(file: Path) -> list[Workload]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        raise CommandFailure(f"cannot read {file} as JSON.") from None
    if isinstance(content, dict) and "workloads" in content:
        content = content["workloads"]
    entries = content if isinstance(content, list) else [content]
    if not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{file} has to hold an object, or a list of them.")
    return [Workload.from_json(entry.get("workload", entry)) for entry in entries]


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise CommandFailure(f"--picture-size has to be like 448x448, not {text}.")
    return int(width), int(height)


@contextmanager
def _progress_bar(console: Console, workloads: Sequence[Workload], rounds: int) -> Iterator[Callable[[str], object]]:
    """Yield what shows that one more question of a workload has been answered."""
    total = rounds * sum(workload.dialogues * workload.turns for workload in workloads)
    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("warm-up", total=total)
        yield lambda name: progress.update(task, advance=1, description=name)


def _check(measured: Measured) -> None:
    """Raise `CommandFailure` when a question failed, with what most of them failed with."""
    failures = [(count, error) for _, summary in measured for error, count in summary.failures.items()]
    if failures:
        total, asked = sum(count for count, _ in failures), sum(summary.num_asked for _, summary in measured)
        raise CommandFailure(f"{total} of {asked} questions failed, most with: {max(failures)[1]}")
