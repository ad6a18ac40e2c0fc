"""The replicas of one stage: who they are, and which of them a call goes to."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import structlog

from gateway.routing.metrics import UNOBSERVED, FleetMetrics, Reason, Stage
from gateway.routing.rendezvous import ranked
from gateway.routing.replica import Replica, RoutingPolicy, State
from gateway.routing.targets import Endpoint
from shared.errors import DeadlineExceeded, InternalError, QueueFull, ServiceError, Unavailable
from shared.tasks import cancelled

T = TypeVar("T")
log = structlog.get_logger()
_PLAIN: Final = RoutingPolicy()
_RESOLVE_EVERY_S: Final = 5.0
_LEAST_PAUSE_S: Final = 0.5  # between two looks, however urgent


class Link(Protocol):
    """The way to one replica."""

    @property
    def stub(self) -> Any:
        """What calls to it are made with."""

    async def watch(self, note: Callable[[bool], None]) -> None:
        """Connect and stay connected; say whether the replica serves, at each change. Returns only when closed."""

    async def aclose(self) -> None:
        """Close it; no call is in progress any more."""


class Resolver(Protocol):
    """Knows where the replicas are."""

    @property
    def can_change(self) -> bool:
        """Whether it is worth while to resolve again."""

    async def resolve(self) -> Sequence[Endpoint]:
        """Return the replicas, each once. Raises `OSError` where that cannot be found out."""


@dataclass(frozen=True, slots=True, eq=False)
class Visit:
    """One call to a replica; `stub` is what it is made with."""

    replica: Replica
    stub: Any

    def answered(self) -> None:
        """Note that the replica has begun to answer."""
        self.replica.answered(self)


@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    replica: Replica
    link: Link
    watching: asyncio.Task[None]

    async def close(self) -> None:
        await cancelled(self.watching)
        await self.link.aclose()


class Fleet:
    """Chooses replicas. One event loop only; of the load it knows what it has placed itself, not other gateways' calls.

    `unavailable` is what a call raises whose replica is lost.
    """

    def __init__(
        self,
        stage: Stage,
        resolver: Resolver,
        open_link: Callable[[Endpoint], Link],
        unavailable: type[Unavailable],
        policy: RoutingPolicy = _PLAIN,
        metrics: FleetMetrics = UNOBSERVED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stage = stage
        self._resolver = resolver
        self._open_link = open_link
        self._unavailable = unavailable
        self._policy = policy
        self._metrics = metrics
        self._clock = clock
        self._members: dict[str, _Member] = {}
        self._leaving: set[_Member] = set()  # known no more, with calls in progress
        self._any_serves = asyncio.Event()
        self._look_again = asyncio.Event()
        self._picks = 0
        metrics.follow(stage, self._count)

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """All replicas that are known. For any thread."""
        return tuple(member.replica for member in tuple(self._members.values()))

    @property
    def stubs(self) -> list[Any]:
        """What calls to each replica are made with, past all choice and all counting."""
        return [member.link.stub for member in tuple(self._members.values())]

    @asynccontextmanager
    async def visit(self, key: str = "", avoid: Collection[Replica] = ()) -> AsyncIterator[Visit]:
        """Choose a replica for one call, which is made while the context lasts; how that ends is noted.

        Those who come with the same key get the same replica as long as it can be had; one of `avoid` only where there
        is no other. No key: any will do. Raises what stands for an absent stage where no replica serves.
        """
        await self._until_any_serves()
        member = self._members[self.choose(key, avoid).address]
        visit = Visit(member.replica, member.link.stub)
        member.replica.begin(visit)
        try:
            yield visit
        except ServiceError as error:
            self._note_error(visit, error)
            raise
        else:
            member.replica.succeeded()
            visit.answered()
        finally:
            if member.replica.end(visit):
                self._note_ejected(member.replica)

    async def ask(self, key: str, answer: Callable[[Visit], Awaitable[T]]) -> T:
        """Return what a replica answers to a call that may be made twice: once more where it was lost or is full."""
        tried: list[Replica] = []
        while True:
            try:
                async with self.visit(key, tried) as visit:
                    tried.append(visit.replica)
                    return await answer(visit)
            except (self._unavailable, QueueFull) as error:
                if not self.is_worth_another(tried, error):
                    raise
                log.info("stage_asked_again", stage=self._stage, reason=error.reason, left=tried[-1].address)

    def is_worth_another(self, tried: Sequence[Replica], error: ServiceError) -> bool:
        """Return whether a call that has failed so, and has brought nothing, should be made again.

        Once it should; where replicas are full only if there is one that was not asked.
        """
        if len(tried) != 1:
            return False
        others = [replica for replica in self.replicas if replica.is_serving and replica not in tried]
        return isinstance(error, self._unavailable) or bool(others)

    def choose(self, key: str = "", avoid: Collection[Replica] = ()) -> Replica:
        """Return the replica that a call with this key goes to; one has to serve."""
        able = self._able(avoid)
        chosen, reason = self._chosen(key, able)
        self._picks += 1
        chosen.last_picked = self._picks
        self._metrics.picks.inc(kind=self._stage, reason=reason)
        return chosen

    async def ready(self) -> None:
        """Return when a replica serves."""
        await self._any_serves.wait()

    async def run(self) -> None:
        """Keep the replicas up to date; never returns."""
        while True:
            await self.update()
            await self._until_due()

    async def update(self) -> None:
        """Find out who the replicas are; those that are known no more finish what they have begun."""
        try:
            endpoints = await self._resolver.resolve()
        except OSError as error:
            log.warning("replicas_not_found", stage=self._stage, error=type(error).__name__, known=len(self._members))
            return
        for address in self._members.keys() - {endpoint.address for endpoint in endpoints}:
            self._leave(address)
        for endpoint in endpoints:
            if endpoint.address not in self._members:
                self._join(endpoint)
        for member in [member for member in self._leaving if not member.replica.calls]:
            self._leaving.discard(member)
            await member.close()

    async def aclose(self) -> None:
        """Close the way to every replica."""
        for member in (*self._members.values(), *self._leaving):
            await member.close()

    def _able(self, avoid: Collection[Replica]) -> list[Replica]:
        """Return those that may be asked: the well ones, else those that serve at all."""
        serving = [replica for replica in self.replicas if replica.is_serving]
        others = [replica for replica in serving if replica not in avoid] or serving
        return [replica for replica in others if replica.state == "ready"] or others

    def _chosen(self, key: str, able: Sequence[Replica]) -> tuple[Replica, Reason]:
        if len(able) == 1:
            return able[0], "only"
        if not key:
            # Of equally busy ones the one that has waited longest for a call.
            return min(able, key=lambda replica: (replica.calls, replica.last_picked)), "least_busy"
        most = self._most_calls(able)
        by_address = {replica.address: replica for replica in able if replica.calls < most}
        order = ranked(key, self._members)
        chosen = next(address for address in order if address in by_address)
        return by_address[chosen], "affinity" if chosen == order[0] else "overflow"

    def _most_calls(self, able: Sequence[Replica]) -> int:
        """Return what a replica may have of calls, the next one included; not all of them have as many."""
        calls = 1 + sum(replica.calls for replica in able)
        return max(self._policy.free_calls, math.ceil(self._policy.load_factor * calls / len(able)))

    def _note_error(self, visit: Visit, error: ServiceError) -> None:
        """Note what an error says of the replica; one that a request deserves is an answer like any other."""
        if isinstance(error, DeadlineExceeded):
            return
        is_lost, is_fault = isinstance(error, self._unavailable), isinstance(error, InternalError)
        if (is_lost and visit.replica.eject()) or (is_fault and visit.replica.faulted()):
            self._note_ejected(visit.replica)
        visit.answered()

    def _note_ejected(self, replica: Replica) -> None:
        log.warning("replica_ejected", stage=self._stage, replica=replica.address, calls=replica.calls)
        self._metrics.ejections.inc(kind=self._stage)

    def _join(self, endpoint: Endpoint) -> None:
        replica, link = Replica(endpoint.address, self._policy, self._clock), self._open_link(endpoint)
        watching = asyncio.create_task(link.watch(lambda serves: self._note_serving(replica, serves)))
        self._members[endpoint.address] = _Member(replica, link, watching)
        log.info("replica_found", stage=self._stage, replica=endpoint.address)

    def _leave(self, address: str) -> None:
        member = self._members.pop(address)
        self._leaving.add(member)
        log.info("replica_gone", stage=self._stage, replica=address, calls=member.replica.calls)
        self._note_serving(member.replica, False)
        member.watching.cancel()

    def _note_serving(self, replica: Replica, serves: bool) -> None:
        if replica.is_serving != serves:
            log.info("replica_changed", stage=self._stage, replica=replica.address, serves=serves)
        replica.is_serving = serves
        if any(each.is_serving for each in self.replicas):
            self._any_serves.set()
        else:
            self._any_serves.clear()
        if not serves:
            self._look_again.set()

    async def _until_any_serves(self) -> None:
        if self._any_serves.is_set():
            return
        self._look_again.set()
        try:
            async with asyncio.timeout(self._policy.patience_s):
                await self._any_serves.wait()
        except TimeoutError:
            raise self._unavailable("A stage that is needed cannot be reached; try again.", retry_after_s=1.0) from None

    async def _until_due(self) -> None:
        """Wait until it is time to look for replicas again."""
        if not self._resolver.can_change:
            await asyncio.Event().wait()
        await asyncio.sleep(_LEAST_PAUSE_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(_RESOLVE_EVERY_S):
                await self._look_again.wait()
        self._look_again.clear()

    def _count(self, state: State) -> int:
        return sum(replica.state == state for replica in self.replicas)
