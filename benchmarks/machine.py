"""What the machine does during a measurement: CPU time of processes and of everybody else, memory, priorities.

Linux only: it reads /proc.
"""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_OWN_AUTOGROUP: Final = _PROC / "self/autogroup"
_IDLE_WINDOW_S: Final = 0.5
_IDLE_CORES: Final = 0.1
_RAISED_BY: Final = 20  # as far as it goes from 0


@dataclass(frozen=True, slots=True)
class ProcessTimes:
    """A process: its parent, and the CPU time in seconds that it and its dead children took."""

    parent: int
    cpu_s: float


def parse_stat(text: str) -> ProcessTimes:
    """Return what a /proc/PID/stat says. The command's name may hold anything, parentheses too."""
    fields = text.rpartition(")")[2].split()
    return ProcessTimes(int(fields[1]), sum(map(int, fields[11:15])) / _TICKS_PER_S)


def parse_busy(text: str) -> float:
    """Return the seconds of CPU time that all cores together have worked, by the first line of /proc/stat.

    Waiting for disks is not work. Guests' time is part of the user's already.
    """
    user, nice, system, _, _, irq, softirq = (int(field) for field in text.splitlines()[0].split()[1:8])
    return (user + nice + system + irq + softirq) / _TICKS_PER_S


def processes() -> dict[int, ProcessTimes]:
    """Return the machine's processes by id."""
    found = {}
    for directory in _PROC.iterdir():
        if directory.name.isdigit():
            with suppress(OSError):  # it has just ended
                found[int(directory.name)] = parse_stat((directory / "stat").read_text())
    return found


def tree(roots: Iterable[int], known: dict[int, ProcessTimes]) -> set[int]:
    """Return the processes among `known` that descend from `roots`, these included."""
    children: dict[int, list[int]] = {}
    for pid, process in known.items():
        children.setdefault(process.parent, []).append(pid)
    found: set[int] = set()
    waiting = [pid for pid in roots if pid in known]
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += children.get(pid, [])
    return found


@dataclass(frozen=True, slots=True)
class CpuUse:
    """Cores that were busy on average: with the processes that were watched, with this one, with all others."""

    watched: float
    client: float
    others: float


class CpuMeter:
    """Measures from when it is made until it is read. A child that was not waited for when it ended is not seen."""

    def __init__(self, roots: Iterable[int]) -> None:
        self._roots = tuple(roots)
        self._before = self._read()

    def read(self) -> CpuUse:
        """Return the use since the meter was made."""
        wall_s, busy_s, watched_s, client_s = (
            after - before for after, before in zip(self._read(), self._before, strict=True)
        )
        others_s = max(0.0, busy_s - watched_s - client_s)
        return CpuUse(*(used / max(wall_s, 1e-9) for used in (watched_s, client_s, others_s)))

    def _read(self) -> tuple[float, float, float, float]:
        known = processes()
        watched_s = sum(known[pid].cpu_s for pid in tree(self._roots, known))
        client = os.times()
        busy_s = parse_busy((_PROC / "stat").read_text())
        return time.perf_counter(), busy_s, watched_s, client.user + client.system


def wait_until_idle(roots: Iterable[int], most_s: float = 15.0) -> None:
    """Return once processes have next to nothing to do, or after `most_s`.

    A server works on for seconds after its answer has come: caches are written, threads wait actively.
    """
    pids, deadline = tuple(roots), time.monotonic() + most_s
    while pids and time.monotonic() < deadline:
        meter = CpuMeter(pids)
        time.sleep(_IDLE_WINDOW_S)
        if meter.read().watched < _IDLE_CORES:
            return


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of processes in MiB.

    `pss` is what they take now, shared pages divided among them; `peak` adds up the most that each has ever had
    resident, pages shared with others included.
    """

    pss: float
    peak: float


def memory_of(roots: Iterable[int]) -> Memory:
    """Return the memory of processes and their descendants."""
    pids = tree(roots, processes())
    return Memory(*(sum(map(read, pids)) / 1024 for read in (_pss_kib, _peak_kib)))


def _pss_kib(pid: int) -> int:
    return _field(_PROC / str(pid) / "smaps_rollup", "Pss:")


def _peak_kib(pid: int) -> int:
    return _field(_PROC / str(pid) / "status", "VmHWM:")


def _field(file: Path, name: str) -> int:
    with suppress(OSError):
        for line in file.read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1])
    return 0


@contextmanager
def high_priority() -> Iterator[None]:
    """Raise this session's share of the CPUs while the context lasts. Needs root: raises `PermissionError`.

    Where Linux shares the CPUs out by session first (autogroup, as on most desktops and many servers), niceness counts
    within a session only: a background job takes half of the machine however nice it is. Sessions of processes that are
    started meanwhile have to be raised by themselves: see `RaisedSessions`. Does nothing where there are no autogroups.
    """
    if not _OWN_AUTOGROUP.exists():
        yield
        return
    before = _niceness(_OWN_AUTOGROUP)
    _OWN_AUTOGROUP.write_text(str(max(-20, before - _RAISED_BY)))
    try:
        yield
    finally:
        _OWN_AUTOGROUP.write_text(str(before))


class RaisedSessions:
    """Raises the share of other sessions as far as `high_priority` raises this process's own, each once.

    They keep their distances: one that has lowered itself stays as far below the others. Needs root.
    """

    def __init__(self) -> None:
        self._raised: set[str] = set()

    def add(self, roots: Iterable[int]) -> None:
        """Raise the sessions of processes and their descendants, those that were not raised before."""
        if not _OWN_AUTOGROUP.exists():
            return
        for pid in tree(roots, processes()):
            file = _PROC / str(pid) / "autogroup"
            with suppress(OSError):  # it has just ended
                name = file.read_text().split()[0]
                if name not in self._raised:
                    _raise(file)
                    self._raised.add(name)


def give_core(roots: Iterable[int], core: int) -> None:
    """Have processes, their descendants and all their threads, with those to come, run on one core."""
    for pid in tree(roots, processes()):
        for task in (_PROC / str(pid) / "task").iterdir():
            with suppress(OSError):  # it has just ended
                os.sched_setaffinity(int(task.name), {core})


def _raise(file: Path) -> None:
    # The kernel takes one change of an autogroup in 100 ms from whoever is not root, and any number from root.
    file.write_text(str(max(-20, _niceness(file) - _RAISED_BY)))


def _niceness(autogroup: Path) -> int:
    """Return the niceness in a file such as "/autogroup-42 nice -5"."""
    return int(autogroup.read_text().split()[-1])
