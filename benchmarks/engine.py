"""Whole questions, our system beside others: `python -m benchmarks.engine --model DIR --peer vllm`.

Starts every system on this machine, one after another, and keeps all of them up. Then asks the scenarios, round by
round, the systems in turn and every second round in the opposite order, so that what drifts on the machine drifts for
all. Every round has questions and pictures that no system has met; all systems get the same.
"""

import argparse
import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.chart import draw
from benchmarks.command import (
    SETTINGS_NOTE,
    add_system_options,
    exit_with,
    machine_facts,
    peers_of,
    priority_of,
    progress,
)
from benchmarks.contender import Contender, MeasuredRound, start_all
from benchmarks.engine_report import figures, panels, report, report_starts
from benchmarks.machine import wait_until_idle
from benchmarks.peers.peer import PeerError
from internvl_client.bench import SCENARIOS, Summary, Workload
from internvl_client.bench.scenarios import DESCRIPTIONS
from internvl_client.cli_bench_output import text_of

COLD: Final = Workload("cold", pictures=1)
_START: Final = "start"
_START_HELP: Final = "nothing; starting and memory are measured in any case"
_COLD_HELP: Final = "a picture that was asked about before the language model's process was restarted"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked: workloads, how many rounds of each, and rounds of `cold`."""

    workloads: Sequence[Workload]
    rounds: int
    cold: Workload
    cold_rounds: int
    seed: int

    @property
    def asked(self) -> Sequence[Workload]:
        """All that is asked at least once."""
        return [*self.workloads, *([self.cold] if self.cold_rounds else [])]


def compare(contenders: Sequence[Contender], plan: Plan) -> None:
    """Ask everything; the figures are kept by the contenders. Raises `PeerError`."""
    length = contenders[0].calibrate(plan.seed)
    for contender in contenders:
        progress(f"warming {contender.name} up")
        contender.length = length
        contender.warm_up(plan.seed)
    for workload in plan.workloads:
        for index in range(plan.rounds):
            for contender in _order(contenders, index):
                wait_until_idle(pid for each in contenders for pid in each.peer.pids)
                _tell(workload, index, contender, contender.ask(workload, plan.seed, index))
    cold = plan.cold
    for index in range(plan.cold_rounds):
        for contender in _order(contenders, index):
            _tell(cold, index, contender, contender.ask_cold(cold, plan.seed, index, progress))


def _order(contenders: Sequence[Contender], round_index: int) -> Iterable[Contender]:
    return contenders if round_index % 2 == 0 else reversed(contenders)


def _tell(workload: Workload, index: int, contender: Contender, measured: MeasuredRound) -> None:
    summary = Summary.of([measured.round])
    failed = f"  {summary.num_failed} FAILED" if summary.num_failed else ""
    progress(
        f"{workload.name:<10} round {index + 1}  {contender.name:<17}{measured.round.wall_s:6.1f} s"
        f"  first token {text_of(summary.ttft_s)} s{failed}"
    )


def measure(arguments: argparse.Namespace) -> None:
    """Do what the command line asks; raise `PeerError`."""
    plan = _plan(arguments)
    with priority_of(arguments), asyncio.Runner() as runner:
        contenders = start_all(peers_of(arguments), arguments.model, runner, progress, raises=arguments.high_priority)
        ended: PeerError | KeyboardInterrupt | None = None
        try:
            compare(contenders, plan)
        except (PeerError, KeyboardInterrupt) as error:
            progress("ended early; what was measured until then follows")
            ended = error
        finally:
            for contender in contenders:
                contender.note_memory()
                contender.peer.stop()
    _write(contenders, plan, arguments)
    if ended:
        raise ended


def _write(contenders: Sequence[Contender], plan: Plan, arguments: argparse.Namespace) -> None:
    asked = [each for each in plan.asked if all(each.name in contender.rounds for contender in contenders)]
    report(contenders, asked)
    report_starts(contenders)
    facts = machine_facts()
    if arguments.json:
        chosen = {name: str(value) for name, value in vars(arguments).items()}
        content = {"machine": facts, "options": chosen} | figures(contenders, asked)
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.plot:
        note = f"{arguments.model.name}, {arguments.dtype}, {facts['cores']} cores of {facts['cpu']}, {facts['time']}"
        draw(panels(contenders, asked), f"Median, least and most of {plan.rounds} rounds. {note}").save(arguments.plot)


def _plan(arguments: argparse.Namespace) -> Plan:
    names = arguments.scenario or [*SCENARIOS, COLD.name]
    if unknown := [name for name in names if name not in (*SCENARIOS, COLD.name, _START)]:
        raise PeerError(
            f"there is no scenario {unknown[0]}; there are {', '.join(SCENARIOS)}, {COLD.name} and {_START}."
        )
    workloads = [SCENARIOS[name] for name in names if name in SCENARIOS]
    try:
        if arguments.workload:
            workloads.append(Workload.from_json(json.loads(arguments.workload.read_text())))
    except (OSError, ValueError) as error:
        raise PeerError(f"{arguments.workload} cannot be asked. {error}") from None
    cold = COLD
    if arguments.output_tokens:
        workloads = [workload.with_output_tokens(arguments.output_tokens) for workload in workloads]
        cold = cold.with_output_tokens(arguments.output_tokens)
    cold_rounds = arguments.cold_rounds if cold.name in names else 0
    return Plan(workloads, arguments.rounds, cold, cold_rounds, arguments.seed)


def main() -> None:
    """Read the command line and measure."""
    described = {**DESCRIPTIONS, COLD.name: _COLD_HELP, _START: _START_HELP}
    scenarios = "\n".join(f"  {name:<10} {said}" for name, said in described.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine",
        description=__doc__,
        epilog=f"scenarios:\n{scenarios}\n\n{SETTINGS_NOTE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_system_options(parser)
    parser.add_argument("--scenario", action="append", metavar="NAME", help="may be repeated; default: all")
    parser.add_argument("--workload", type=Path, help="JSON file of one more workload, named as in `internvl bench`")
    parser.add_argument("--output-tokens", type=int, help="instead of the scenarios' own")
    parser.add_argument("--cold-rounds", type=int, default=1, help="rounds of cold: restarts (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="also draw the figures into this PNG")
    arguments = parser.parse_args()
    exit_with(lambda: measure(arguments))


if __name__ == "__main__":
    main()
