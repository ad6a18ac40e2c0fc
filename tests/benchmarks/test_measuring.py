"""Measuring whole systems: the machine's own figures, running answers beside pictures, and the tables."""

import asyncio
import os
import select
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from benchmarks import engine, engine_report, running_answers
from benchmarks.chart import Group, Panel, draw
from benchmarks.contender import Contender, start_all
from benchmarks.machine import (
    CpuMeter,
    ProcessTimes,
    memory_of,
    parse_busy,
    parse_stat,
    processes,
    tree,
    wait_until_idle,
)
from benchmarks.peers.peer import PeerError, Report
from internvl_client.bench import SCENARIOS, Spread, Target, TargetError, Workload
from tests.client.fake_target import Answer, FakeTarget, exchange, refuse

TICKS = os.sysconf("SC_CLK_TCK")


def test_a_process_is_read_whatever_its_name_is() -> None:
    times = f"{1 * TICKS} {2 * TICKS} {3 * TICKS} {4 * TICKS}"
    text = f"42 (a) b (c) S 7 42 42 0 -1 4194304 100 0 0 0 {times} 20 0 1 0 100 0 0"
    assert parse_stat(text) == ProcessTimes(parent=7, cpu_s=10.0)


def test_busy_is_what_cores_worked_and_not_what_they_waited() -> None:
    text = f"cpu  {1 * TICKS} {2 * TICKS} {3 * TICKS} 1000 1000 {4 * TICKS} {5 * TICKS} 0 0 0\ncpu0 1 2 3\n"
    assert parse_busy(text) == 15.0


def test_a_tree_is_all_that_descends() -> None:
    known = {pid: ProcessTimes(parent, 0.0) for pid, parent in ((1, 0), (2, 1), (3, 2), (4, 1), (5, 9))}
    assert tree([2], known) == {2, 3}
    assert tree([1, 77], known) == {1, 2, 3, 4}


def test_this_process_has_memory_and_a_place_in_the_tree() -> None:
    assert os.getpid() in tree([os.getppid()], processes())
    memory = memory_of([os.getpid()])
    assert 0 < memory.pss <= memory.peak


def test_no_cpu_time_is_counted_twice() -> None:
    use = CpuMeter([os.getpid()]).read()
    assert min(use.watched, use.client, use.others) >= 0


class FakePeer:
    """A peer that needs no process; keeps what was done to it."""

    def __init__(self, name: str = "fake", answer: Answer | None = None) -> None:
        self.name = name
        self.pids: tuple[int, ...] = ()
        self.target = FakeTarget(answer)
        self.did: list[str] = []

    def start(self, checkpoint: Path, report: Report) -> str:
        self.did.append("start")
        return "first"

    def restart(self, report: Report) -> str:
        self.did.append("restart")
        return "second"

    def stop(self) -> None:
        self.did.append("stop")

    @asynccontextmanager
    async def connect(self, address: str) -> AsyncIterator[Target]:
        self.did.append(f"connect {address}")
        yield self.target


def started(*peers: FakePeer) -> list[Contender]:
    return start_all(peers, Path(), asyncio.Runner(), lambda text: None, raises=False)


def test_systems_are_asked_the_same_in_turns() -> None:
    order: list[str] = []
    peers = [FakePeer(name, lambda question, name=name: (order.append(name), exchange(1.0, 2.0))[1]) for name in "ab"]  # type: ignore[misc]
    contenders = started(*peers)
    order.clear()
    plan = engine.Plan([Workload("one")], rounds=3, cold=engine.COLD, cold_rounds=0, seed=1)
    engine.compare(contenders, plan)
    assert "".join(order)[-6:] == "abbaab"
    one, other = (peer.target.asked[-3:] for peer in peers)
    assert one == other
    assert contenders[0].summary("one").num_asked == 3


_WORKS_A_WHILE = """
import time
end = time.process_time() + 1
while time.process_time() < end:
    pass
print("idle", flush=True)
time.sleep(600)
"""


def test_a_process_that_works_is_waited_for() -> None:
    with subprocess.Popen([sys.executable, "-c", _WORKS_A_WHILE], stdout=subprocess.PIPE) as busy:
        try:
            assert busy.stdout is not None
            wait_until_idle([busy.pid], most_s=60)
            assert select.select([busy.stdout], [], [], 0)[0]
        finally:
            busy.kill()


def test_where_nobody_works_nobody_is_waited_for() -> None:
    wait_until_idle([], most_s=600)


def test_cold_asks_again_about_the_same_picture_after_a_restart() -> None:
    peer = FakePeer()
    (contender,) = started(peer)
    contender.ask_cold(engine.COLD, 1, 0, lambda text: None)
    _, before, warming, measured = peer.target.asked
    assert before.pictures == measured.pictures
    assert (warming.pictures, before.text != measured.text) == ((), True)
    assert peer.did[-3:] == ["restart", "connect second", "connect second"]
    assert len(contender.rounds["cold"]) == 1


def test_one_that_does_not_answer_ends_all_that_run() -> None:
    good, bad = FakePeer("good"), FakePeer("bad", refuse)
    with pytest.raises(PeerError, match="bad did not answer: nobody is there"):
        started(good, bad)
    assert good.did[-1] == bad.did[-1] == "stop"


def test_figures_tables_and_bars_hold_every_system(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    contenders = started(FakePeer("ours"), FakePeer("theirs"))
    workloads = [SCENARIOS["text1"], SCENARIOS["turns4"]]
    plan = engine.Plan(workloads, rounds=2, cold=engine.COLD, cold_rounds=1, seed=1)
    engine.compare(contenders, plan)
    engine_report.report(contenders, plan.asked)
    engine_report.report_starts(contenders)
    shown = capsys.readouterr().out
    assert [shown.count(name) for name in ("ours", "theirs", "turns4")] == [5, 5, 2]
    figures = engine_report.figures(contenders, plan.asked)
    assert [len(entry["systems"]) for entry in figures["scenarios"]] == [2, 2, 2]
    picture = draw(engine_report.panels(contenders, plan.asked), "a note")
    assert picture.width == 900


def test_bars_are_as_long_as_their_medians() -> None:
    groups = [Group("x", [("a", Spread(2.0, 2.0, 2.0, 1)), ("b", Spread(1.0, 1.0, 1.0, 1)), ("c", None)])]
    picture = draw([Panel("title", "s", groups)], "note")
    rows = [[picture.getpixel((x, y)) for x in range(picture.width)] for y in range(picture.height)]
    long = max(row.count((0x1F, 0x5F, 0xBF)) for row in rows)
    short = max(row.count((0xC0, 0x70, 0x20)) for row in rows)
    assert long == pytest.approx(2 * short, abs=3)


async def test_the_head_of_the_line_is_a_story_then_pictures_then_a_question() -> None:
    target = FakeTarget(lambda question: exchange(1.0, 4.0, 5.0))
    story, question, pictures = await running_answers.head_of_line(target, "seed", pause_s=0.0)
    assert (story.longest_gap_s, question.ttft_s, len(pictures)) == (3.0, 1.0, 4)
    assert [len(asked.pictures) for asked in target.asked] == [0, 1, 1, 1, 1, 0]


async def test_a_running_answer_that_fails_ends_the_measurement() -> None:
    with pytest.raises(TargetError, match="nobody is there"):
        await running_answers.beside(FakeTarget(refuse), "seed", 2, with_pictures=False)
