"""A system in a comparison: started, asked in turn with the others, and what came of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.machine import CpuMeter, CpuUse, Memory, RaisedSessions, memory_of
from benchmarks.peers.peer import Peer, PeerError, Report
from internvl_client.bench import Round, Summary, Target, TargetError, Workload, ask_round, calibrate, warm_up
from internvl_client.bench.questions import ORDINARY, Question, TextLength, questions_of, text_of

_FEW_TOKENS: Final = 4
_NO_MEMORY: Final = Memory(0, 0)


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds from the start until it said that it was ready, and until its first answer ended; memory then."""

    ready_s: float
    first_answer_s: float
    memory: Memory


@dataclass(frozen=True, slots=True)
class MeasuredRound:
    """A round, and who had the CPUs meanwhile."""

    round: Round
    cpu: CpuUse

    def to_json(self) -> dict[str, Any]:
        """Return every exchange and the cores that were busy."""
        return {
            "wall_s": self.round.wall_s,
            "cores": {"system": self.cpu.watched, "client": self.cpu.client, "others": self.cpu.others},
            "dialogues": [[exchange.to_json() for exchange in dialogue] for dialogue in self.round.dialogues],
        }


@dataclass(slots=True)
class Contender:
    """A peer that runs, where it listens, its rounds by the name of the workload, and its most memory.

    With `sessions` its processes have a larger share of the CPUs: see `benchmarks.machine.high_priority`.
    """

    peer: Peer
    runner: asyncio.Runner
    address: str
    start: Start
    sessions: RaisedSessions | None = None
    memory: Memory = _NO_MEMORY
    length: TextLength = ORDINARY
    rounds: dict[str, list[MeasuredRound]] = field(default_factory=dict)

    @classmethod
    def started(cls, peer: Peer, checkpoint: Path, runner: asyncio.Runner, report: Report) -> Contender:
        """Start a peer and have it answer once; raise `PeerError`. It is stopped where that fails."""
        began = time.perf_counter()
        address = peer.start(checkpoint, report)
        ready_s = time.perf_counter() - began
        contender = cls(peer, runner, address, Start(ready_s, ready_s, _NO_MEMORY))
        try:
            runner.run(contender._ask_unmeasured(Question("Hello")))
            contender.start = Start(ready_s, time.perf_counter() - began, memory_of(peer.pids))
        except BaseException:
            peer.stop()
            raise
        return contender

    @property
    def name(self) -> str:
        """What its figures are headed with."""
        return self.peer.name

    def summary(self, workload: str) -> Summary:
        """Return what its rounds of a workload come to."""
        return Summary.of([measured.round for measured in self.rounds[workload]])

    def others_cores(self, workload: str) -> float:
        """Return the most cores that others had in a round."""
        return max(measured.cpu.others for measured in self.rounds[workload])

    def calibrate(self, seed: int) -> TextLength:
        """Return how long texts have to be for its tokenizer; raise `PeerError`."""
        return self.runner.run(self._calibrate(seed))

    def warm_up(self, seed: int) -> None:
        """Ask what is not measured; raise `PeerError`."""
        self.runner.run(self._warm_up(seed))

    def ask(self, workload: Workload, seed: int, round_index: int) -> MeasuredRound:
        """Ask a round, keep it and return it; raise `PeerError`."""
        measured = self.runner.run(self._ask(workload, seed, round_index))
        self.rounds.setdefault(workload.name, []).append(measured)
        return measured

    def ask_cold(self, workload: Workload, seed: int, round_index: int, report: Report) -> MeasuredRound:
        """Ask about a picture, restart whatever holds the language model, and measure another question about it."""
        ((question,),) = questions_of(workload, seed, round_index, self.length)
        self.runner.run(self._ask_unmeasured(question))
        self.restart(report)
        # What a server does for the very first question of its life is not what is measured.
        self.runner.run(self._ask_unmeasured(Question(text_of(8, f"after:{seed}"))))
        again = Question(f"now {question.text}", question.pictures)
        measured = self.runner.run(self._ask_again(workload, again))
        self.rounds.setdefault(workload.name, []).append(measured)
        return measured

    def note_memory(self) -> None:
        """Keep the most memory that it was seen to take; to be called before its processes end."""
        now = memory_of(self.peer.pids)
        self.memory = Memory(max(self.memory.pss, now.pss), max(self.memory.peak, now.peak))

    def restart(self, report: Report) -> None:
        """Restart whatever holds the language model; raise `PeerError`."""
        self.note_memory()
        self.address = self.peer.restart(report)
        self.take_share()

    def take_share(self) -> None:
        """Raise its processes' share of the CPUs where that is wished; those of a restarted one have to be again."""
        if self.sessions:
            self.sessions.add(self.peer.pids)

    @asynccontextmanager
    async def asked(self) -> AsyncIterator[Target]:
        """Yield what asks it; a question without an answer becomes a `PeerError`."""
        try:
            async with self.peer.connect(self.address) as target:
                yield target
        except TargetError as error:
            raise PeerError(f"{self.name} did not answer: {error}") from None

    async def _calibrate(self, seed: int) -> TextLength:
        async with self.asked() as target:
            return await calibrate(target, seed)

    async def _warm_up(self, seed: int) -> None:
        async with self.asked() as target:
            await warm_up(target, seed, self.length)

    async def _ask(self, workload: Workload, seed: int, round_index: int) -> MeasuredRound:
        async with self.asked() as target:
            meter = CpuMeter(self.peer.pids)
            asked = await ask_round(workload, target, seed=seed, round_index=round_index, length=self.length)
            return MeasuredRound(asked, meter.read())

    async def _ask_unmeasured(self, question: Question) -> None:
        async with self.asked() as target, target.dialogue(1) as dialogue:
            await dialogue.ask(question, _FEW_TOKENS)

    async def _ask_again(self, workload: Workload, question: Question) -> MeasuredRound:
        async with self.asked() as target, target.dialogue(1) as dialogue:
            meter, began = CpuMeter(self.peer.pids), time.perf_counter()
            exchange = await dialogue.ask(question, workload.output_tokens)
            return MeasuredRound(Round(((exchange,),), time.perf_counter() - began), meter.read())


def start_all(
    peers: Iterable[Peer], checkpoint: Path, runner: asyncio.Runner, report: Report, *, raises: bool
) -> list[Contender]:
    """Start peers one after another, so that none is in another's way; stop all of them where one fails."""
    contenders: list[Contender] = []
    try:
        for peer in peers:
            report(f"starting {peer.name}")
            contenders.append(Contender.started(peer, checkpoint, runner, report))
            contenders[-1].sessions = RaisedSessions() if raises else None
            contenders[-1].take_share()
            report(f"{peer.name} is ready after {contenders[-1].start.ready_s:.1f} s")
    except BaseException:
        for contender in contenders:
            contender.peer.stop()
        raise
    return contenders
