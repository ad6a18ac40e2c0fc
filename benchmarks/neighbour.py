"""Measures how a vision tower slows down decoding beside it on the same cores: `python -m benchmarks.neighbour`.

One process multiplies one row by many matrices, as decoding does, and times its steps. Another multiplies large
matrices without an end, as a tower does: as it is, with a niceness of its threads alone, and as `--cpu-nice 10` has it.
Each is a session, as the parts of the local system are.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import torch
from torch.nn import functional

from vision_service.priority import lower_priority

_WIDTH: Final = 1024
_MATRICES: Final = 24
_NICE: Final = 10
_TOWERS: Final = {"beside a tower": "plain", "its threads niced": "threads", f"--cpu-nice {_NICE}": "niced"}


def decode() -> None:
    """For every number of seconds that is asked for, answer with the times of steps; no cache holds the matrices."""
    matrices = [torch.randn(4 * _WIDTH, _WIDTH) for _ in range(_MATRICES)]
    row = torch.randn(1, _WIDTH)
    for seconds in sys.stdin:
        times: list[float] = []
        end = time.perf_counter() + float(seconds)
        while (started := time.perf_counter()) < end:
            for matrix in matrices:
                functional.linear(row, matrix)
            times.append(time.perf_counter() - started)
        print(json.dumps(times), flush=True)


def encode(kind: str, base_nice: int) -> None:
    """Multiply large matrices until killed."""
    if kind == "threads":
        os.setpriority(os.PRIO_PROCESS, 0, base_nice + _NICE)
    elif kind == "niced":
        lower_priority(base_nice + _NICE)
    left, right = (torch.randn(1025, _WIDTH, dtype=torch.bfloat16) for _ in range(2))
    functional.linear(left, right)
    print("ready", flush=True)
    while True:
        functional.linear(left, right)


@contextmanager
def _session(role: str, base_nice: int) -> Iterator[subprocess.Popen[str]]:
    flags = ["--role", role, "--base-nice", str(base_nice)]
    command = [sys.executable, "-m", "benchmarks.neighbour", *flags]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _answer(process: subprocess.Popen[str], question: str = "") -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(question)
    process.stdin.flush()
    return process.stdout.readline()


def measure(seconds: float, rounds: int, base_nice: int) -> dict[str, list[float]]:
    """Return the times of steps, case by case; the cases take turns."""
    with ExitStack() as stack:
        decoder = stack.enter_context(_session("decode", base_nice))
        towers = {name: stack.enter_context(_session(kind, base_nice)) for name, kind in _TOWERS.items()}
        for tower in towers.values():
            _answer(tower)
            tower.send_signal(signal.SIGSTOP)
        times: dict[str, list[float]] = {"alone": [], **{name: [] for name in towers}}
        _answer(decoder, "0.5\n")
        for _ in range(rounds):
            times["alone"] += json.loads(_answer(decoder, f"{seconds}\n"))
            for name, tower in towers.items():
                tower.send_signal(signal.SIGCONT)
                times[name] += json.loads(_answer(decoder, f"{seconds}\n"))
                tower.send_signal(signal.SIGSTOP)
    return times


def main() -> None:
    """Measure and print; or be one of the two that are measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--seconds", type=float, default=2.5, help="time for each case")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--base-nice", type=int, default=0, help="niceness of both; below 0 (root) others hardly count")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--role", choices=["decode", *_TOWERS.values()], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        lower_priority(arguments.base_nice)
        decode() if arguments.role == "decode" else encode(arguments.role, arguments.base_nice)
        return
    times = measure(arguments.seconds, arguments.rounds, arguments.base_nice)
    alone = statistics.median(times["alone"])
    for name, steps in times.items():
        median, slow = statistics.median(steps), statistics.quantiles(steps, n=20)[-1]
        print(f"{name:<20} step {median * 1e3:6.1f} ms, 95 % within {slow * 1e3:6.1f} ms, {median / alone:.2f} x alone")
    if arguments.json:
        arguments.json.write_text(json.dumps(times) + "\n")


if __name__ == "__main__":
    main()
