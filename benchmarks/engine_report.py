"""What a comparison shows and writes: tables, figures for JSON, and bars."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Final

from benchmarks.chart import Group, Panel
from benchmarks.contender import Contender
from internvl_client.bench import Spread, Summary, Workload
from internvl_client.cli_bench_output import HEADINGS, cells_of, text_of

_HEADINGS: Final = (*HEADINGS, "prompt", "others")
_COLUMN_WIDTHS: Final = (20, 20, 20, 19, 22, 16, 6)


def report(contenders: Sequence[Contender], workloads: Sequence[Workload]) -> None:
    """Print a line per workload and contender."""
    print("\n" + _row("", "", _HEADINGS))
    for workload in workloads:
        for contender in contenders:
            summary = contender.summary(workload.name)
            print(_row(workload.name, contender.name, _cells(summary, contender.others_cores(workload.name))))
            for failure, count in summary.failures.items():
                print(f"{'':<11}{count} of {summary.num_asked} failed: {failure}")
        if workload.turns > 1:
            for contender in contenders:
                turns = ", ".join(text_of(spread) for spread in contender.summary(workload.name).turn_ttft_s)
                print(f"{'':<11}{contender.name:<18}first token by turn, s: {turns}")
    print("\nMedian [least-most]. others: the most cores that other processes had during a round.")


def _cells(summary: Summary, others_cores: float) -> tuple[str, ...]:
    return (*cells_of(summary), text_of(summary.prompt_tokens, 1, 0), f"{others_cores:.2f}")


def _row(workload: str, name: str, cells: Sequence[str]) -> str:
    return f"{workload:<11}{name:<18}" + "".join(
        f"{cell:<{width}}" for cell, width in zip(cells, _COLUMN_WIDTHS, strict=True)
    )


def report_starts(contenders: Sequence[Contender]) -> None:
    """Print how long each took to start, and its memory then and later."""
    print(f"\n{'':<18}{'ready s':>9}{'first answer s':>16}{'MiB then':>11}{'most MiB seen':>16}{'peak MiB':>10}")
    for contender in contenders:
        start, most = contender.start, contender.memory
        print(
            f"{contender.name:<18}{start.ready_s:>9.1f}{start.first_answer_s:>16.1f}{start.memory.pss:>11.0f}"
            f"{most.pss:>16.0f}{most.peak:>10.0f}"
        )
    print("Memory of all processes; shared pages are divided, except in the peak, which adds up each process's own.")


def figures(contenders: Sequence[Contender], workloads: Sequence[Workload]) -> dict[str, Any]:
    """Return everything that was measured."""
    return {
        "systems": {
            contender.name: {"start": asdict(contender.start), "memory_mib": asdict(contender.memory)}
            for contender in contenders
        },
        "scenarios": [
            {
                "workload": workload.to_json(),
                "systems": {
                    contender.name: {
                        "summary": contender.summary(workload.name).to_json(),
                        "others_cores": contender.others_cores(workload.name),
                        "rounds": [measured.to_json() for measured in contender.rounds[workload.name]],
                    }
                    for contender in contenders
                },
            }
            for workload in workloads
        ],
    }


def panels(contenders: Sequence[Contender], workloads: Sequence[Workload]) -> list[Panel]:
    """Return what is drawn."""

    def groups(figure: Callable[[Summary], Spread | None]) -> list[Group]:
        return [
            Group(each.name, [(one.name, figure(one.summary(each.name))) for one in contenders]) for each in workloads
        ]

    return [
        Panel("Time to the first token, less is better", "s", groups(lambda summary: summary.ttft_s)),
        Panel("Time per output token, less is better", "ms", groups(lambda summary: summary.tpot_s), 1e3, 1),
        Panel("Output, more is better", "tokens/s", groups(lambda summary: summary.output_tokens_per_s), digits=1),
    ]
