"""What the split into services costs one question about a picture that nobody has seen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.command import progress
from benchmarks.contender import Contender
from benchmarks.one_process import OneProcess
from benchmarks.running_answers import ask
from benchmarks.table import text_of_all
from internvl_client.bench import SCENARIOS, Question, Workload
from internvl_client.bench.questions import questions_of

_TILES: Final[Mapping[str, Workload]] = {"1 tile": SCENARIOS["single"], "12 tiles": SCENARIOS["tiles12"]}


@dataclass(frozen=True, slots=True)
class Tax:
    """Seconds to the first token for one picture that nobody has seen, through the services and in one process."""

    services_s: float
    one_process_s: float


def measure_tax(ours: Contender, process: OneProcess, seed: int, rounds: int) -> dict[str, list[Tax]]:
    """Return the two times of new pictures by their size; the ways take turns. Raises `PeerError`."""
    found: dict[str, list[Tax]] = {}
    for size, workload in _TILES.items():
        for index in range(rounds + 1):  # the first is not measured
            ((question,),) = questions_of(workload, seed, index)
            tax = Tax(ours.runner.run(_first_token(ours, question)), process.ask(question))
            progress(
                f"tax {size} round {index}  services {tax.services_s:.3f} s, one process {tax.one_process_s:.3f} s"
            )
            if index:
                found.setdefault(size, []).append(tax)
    return found


async def _first_token(ours: Contender, question: Question) -> float:
    async with ours.asked() as target:
        return (await ask(target, question, 1)).ttft_s


def report_tax(taxes: Mapping[str, Sequence[Tax]]) -> None:
    """Print what the split costs."""
    print(f"\n{'first token of a new picture':<30}{'services s':<22}{'one process s':<22}the split costs, ms")
    for size, found in taxes.items():
        services, one = (
            text_of_all((tax.services_s for tax in found), 1, 3),
            text_of_all((tax.one_process_s for tax in found), 1, 3),
        )
        cost = text_of_all(((tax.services_s - tax.one_process_s) for tax in found), 1e3, 0)
        print(f"{size:<30}{services:<22}{one:<22}{cost}")
