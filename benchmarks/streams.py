"""What running answers suffer from pictures: `python -m benchmarks.streams --model DIR --peer vllm`.

The head of the line: a long answer runs, several new pictures arrive, then a question without a picture. How long does
the answer stand still, and how long does the question wait?

--encode-beside: the time per token of running answers while new pictures are asked about one after another, and without
them. With --own-cores our LLM service has one core in both cases, and everything else of our system another.

--split-tax: the time to the first token of a question about a new picture through our services, and of the same code in
one process, with a picture of one tile and one of twelve.
"""

import argparse
import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from benchmarks.command import (
    SETTINGS_NOTE,
    add_system_options,
    exit_with,
    machine_facts,
    peers_of,
    priority_of,
    progress,
)
from benchmarks.contender import start_all
from benchmarks.machine import RaisedSessions
from benchmarks.one_process import one_process
from benchmarks.ours import OurSystem
from benchmarks.peers.peer import PeerError
from benchmarks.running_answers import Beside, HeadOfLine, Streams
from benchmarks.split_tax import Tax, measure_tax, report_tax
from benchmarks.table import text_of_all


def report_lines(lines: dict[str, list[HeadOfLine]]) -> None:
    """Print the head of the line."""
    print(f"\n{'head of the line':<18}{'longest gap s':<20}{'question waits s':<20}{'pictures wait s':<24}others")
    for name, found in lines.items():
        gap = text_of_all(each.gap_s for each in found)
        question = text_of_all(each.question_ttft_s for each in found)
        pictures = text_of_all(wait for each in found for wait in each.picture_ttft_s)
        print(f"{name:<18}{gap:<20}{question:<20}{pictures:<24}{max(each.others_cores for each in found):.2f}")


def report_beside(streams: Streams) -> None:
    """Print running answers with and without pictures beside them."""
    print(f"\n{'running answers':<18}{'':<10}{'per token ms':<24}{'longest gap ms':<24}{'pictures':<10}others")
    for name in streams.alone:
        for label, found in (("alone", streams.alone[name]), ("beside", streams.beside[name])):
            tpot = text_of_all((value for each in found for value in each.tpot_s), 1e3, 1)
            gap = text_of_all((value for each in found for value in each.gap_s), 1e3, 0)
            pictures = text_of_all((each.num_pictures for each in found), 1, 0)
            others = max(each.others_cores for each in found)
            print(f"{name:<18}{label:<10}{tpot:<24}{gap:<24}{pictures:<10}{others:.2f}")


def measure(arguments: argparse.Namespace) -> None:
    """Do what the command line asks; raise `PeerError`."""
    peers = peers_of(arguments)
    ours = peers[0]
    if (arguments.split_tax or arguments.own_cores) and not isinstance(ours, OurSystem):
        raise PeerError("--split-tax and --own-cores measure our services: leave --without-us out.")
    if arguments.own_cores:
        os.environ.update(dict.fromkeys(("LLM_THREADS", "VISION_THREADS"), "1"))
    with priority_of(arguments), ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        contenders = start_all(peers, arguments.model, runner, progress, raises=arguments.high_priority)
        for contender in contenders:
            stack.callback(contender.peer.stop)
        for contender in contenders:
            progress(f"warming {contender.name} up")
            contender.warm_up(arguments.seed)
        if arguments.own_cores and isinstance(ours, OurSystem):
            ours.separate()
        streams = Streams(contenders, arguments.seed, arguments.rounds)
        taxes: dict[str, list[Tax]] = {}
        if not arguments.without_line:
            streams.measure_lines()
        if arguments.encode_beside:
            streams.measure_beside(arguments.streams)
        if arguments.split_tax:
            process = stack.enter_context(one_process(arguments.model, arguments.dtype, progress))
            if arguments.high_priority:
                RaisedSessions().add([process.pid])
            taxes = measure_tax(contenders[0], process, arguments.seed, arguments.rounds)
    _report(streams, taxes, arguments)


def _report(streams: Streams, taxes: dict[str, list[Tax]], arguments: argparse.Namespace) -> None:
    if not arguments.without_line:
        report_lines(streams.lines)
    if arguments.encode_beside:
        report_beside(streams)
    if taxes:
        report_tax(taxes)
    print("\nMedian [least-most]. others: the most cores that other processes had during a round.")
    if arguments.json:
        figures = {
            "line": _plain(streams.lines),
            "alone": _plain(streams.alone),
            "beside": _plain(streams.beside),
            "split_tax": _plain(taxes),
        }
        content = {"machine": machine_facts(), "options": {name: str(value) for name, value in vars(arguments).items()}}
        arguments.json.write_text(json.dumps(content | figures, indent=1) + "\n")


def _plain(by_name: Mapping[str, Sequence[HeadOfLine | Beside | Tax]]) -> dict[str, Any]:
    return {name: [asdict(one) for one in found] for name, found in by_name.items()}


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.streams",
        description=__doc__,
        epilog=SETTINGS_NOTE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_system_options(parser)
    parser.add_argument("--without-line", action="store_true", help="leave the head of the line out")
    parser.add_argument("--encode-beside", action="store_true", help="also measure tokens beside pictures")
    parser.add_argument("--own-cores", action="store_true", help="our LLM service has a core of its own")
    parser.add_argument("--streams", type=int, default=4, help="running answers beside pictures (default: %(default)s)")
    parser.add_argument("--split-tax", action="store_true", help="also measure our services against one process")
    arguments = parser.parse_args()
    exit_with(lambda: measure(arguments))


if __name__ == "__main__":
    main()
