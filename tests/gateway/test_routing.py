"""Which replica is asked: by key, within bounds of load, away from what fails. The clock is the tests' own."""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest

from gateway.content import Role
from gateway.prompt import EmbeddingHandle, Prompt, TextSegment, Turn, VisualSegment
from gateway.routing import Endpoint, Fleet, FleetMetrics, RoutingPolicy, Targets, affinity_of
from gateway.routing.fleet import Visit
from gateway.routing.rendezvous import ranked
from shared.errors import DeadlineExceeded, InternalError, InvalidRequest, LlmUnavailable, QueueFull
from shared.prometheus import PrometheusRegistry

KEYS = [f"conversation-{number}" for number in range(1000)]
PLAIN = RoutingPolicy(patience_s=0.0)


class Clock:
    """A time that only tests move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeLink:
    """A way to a replica that serves or does not, as the test says."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.stub = endpoint.address
        self.note: Callable[[bool], None] | None = None
        self.is_closed = False

    async def watch(self, note: Callable[[bool], None]) -> None:
        self.note = note
        note(True)
        await asyncio.Event().wait()

    async def aclose(self) -> None:
        self.is_closed = True


class FakeFleet(Fleet):
    """A fleet of these addresses, all of which serve."""

    def __init__(self, addresses: Sequence[str], policy: RoutingPolicy = PLAIN, **more: Any) -> None:
        self.addresses: list[str] | OSError = list(addresses)
        self.links: dict[str, FakeLink] = {}
        self.clock = Clock()
        super().__init__("llm", self, self._linked, LlmUnavailable, policy, clock=self.clock, **more)

    can_change = True

    async def resolve(self) -> list[Endpoint]:
        if isinstance(self.addresses, OSError):
            raise self.addresses
        return [Endpoint(address) for address in self.addresses]

    def _linked(self, endpoint: Endpoint) -> FakeLink:
        self.links[endpoint.address] = FakeLink(endpoint)
        return self.links[endpoint.address]

    async def now(self, *addresses: str) -> None:
        """Find these replicas, and hear from all of them."""
        self.addresses = list(addresses)
        await self.update()
        await asyncio.sleep(0)

    def say(self, address: str, *, serves: bool) -> None:
        note = self.links[address].note
        assert note is not None
        note(serves)

    async def fail(self, error: Exception, key: str = "key") -> str:
        """Make a call that fails; return the replica it went to."""
        with pytest.raises(type(error)):
            async with self.visit(key) as visit:
                raise error
        return visit.replica.address


async def fleet_of(count: int, policy: RoutingPolicy = PLAIN, **more: Any) -> FakeFleet:
    fleet = FakeFleet([], policy, **more)
    await fleet.now(*(f"10.0.0.{number}:50" for number in range(count)))
    return fleet


def placed(fleet: Fleet) -> dict[str, str]:
    return {key: fleet.choose(key).address for key in KEYS}


async def test_a_key_stays_where_it_is() -> None:
    assert placed(await fleet_of(5)) == placed(await fleet_of(5))


async def test_keys_are_spread_evenly() -> None:
    shares = Counter(placed(await fleet_of(5)).values())
    assert len(shares) == 5
    assert min(shares.values()) > 150


async def test_a_replica_that_goes_moves_its_own_keys_and_no_others() -> None:
    fleet = await fleet_of(5)
    before = placed(fleet)
    left = fleet.replicas[2].address
    await fleet.now(*(replica.address for replica in fleet.replicas if replica.address != left))
    after = placed(fleet)
    assert {key for key in KEYS if before[key] != after[key]} == {key for key in KEYS if before[key] == left}
    assert len(set(after.values())) == 4


async def test_a_replica_that_comes_takes_its_share_and_moves_nothing_else() -> None:
    fleet = await fleet_of(4)
    before = placed(fleet)
    await fleet.now(*(replica.address for replica in fleet.replicas), "10.0.0.9:50")
    moved = {address for key, address in placed(fleet).items() if before[key] != address}
    assert moved == {"10.0.0.9:50"}


async def test_a_replica_that_is_away_hands_its_keys_on_and_gets_them_back() -> None:
    fleet = await fleet_of(3)
    first, second, _ = ranked("key", [replica.address for replica in fleet.replicas])
    fleet.say(first, serves=False)
    assert fleet.choose("key").address == second
    fleet.say(first, serves=True)
    assert fleet.choose("key").address == first


async def test_no_replica_has_much_more_than_its_share_of_one_popular_key() -> None:
    fleet = await fleet_of(4, RoutingPolicy(load_factor=1.25, free_calls=2))
    async with AsyncExitStack() as stack:
        for _ in range(100):
            await stack.enter_async_context(fleet.visit("the key that all have"))
        calls = sorted(replica.calls for replica in fleet.replicas)
    assert sum(calls) == 100
    assert calls[-1] <= math.ceil(1.25 * 100 / 4)
    assert calls[0] > 0
    assert all(replica.calls == 0 for replica in fleet.replicas)


async def test_a_few_calls_stay_together_however_uneven_that_is() -> None:
    fleet = await fleet_of(4, RoutingPolicy(free_calls=4))
    async with AsyncExitStack() as stack:
        visits = [await stack.enter_async_context(fleet.visit("key")) for _ in range(4)]
        assert len({visit.replica for visit in visits}) == 1


async def test_calls_without_a_key_go_to_the_least_busy_in_turn() -> None:
    fleet = await fleet_of(3)
    async with fleet.visit() as busy:
        others = {fleet.choose().address for _ in range(4)}
    assert others == {replica.address for replica in fleet.replicas} - {busy.replica.address}


async def test_a_replica_that_failed_is_left_alone_twice_as_long_each_time() -> None:
    fleet = await fleet_of(2, RoutingPolicy(ejection_s=1.0, max_ejection_s=3.0, patience_s=0.0))
    first = await fleet.fail(LlmUnavailable("Gone."))
    for left_alone_s in (1.0, 2.0, 3.0, 3.0):
        fleet.clock.now += left_alone_s - 0.01
        assert fleet.choose("key").address != first
        fleet.clock.now += 0.02
        assert await fleet.fail(LlmUnavailable("Gone.")) == first


async def test_an_answer_makes_a_replica_as_good_as_new() -> None:
    fleet = await fleet_of(2)
    first = await fleet.fail(LlmUnavailable("Gone."))
    fleet.clock.now += 1.01
    async with fleet.visit("key") as visit:
        assert visit.replica.address == first
    await fleet.fail(LlmUnavailable("Gone."))
    fleet.clock.now += 1.01
    assert fleet.choose("key").address == first


async def test_a_death_that_breaks_many_calls_counts_once() -> None:
    fleet = await fleet_of(2)
    async with AsyncExitStack() as stack:
        visits = [await stack.enter_async_context(fleet.visit("key")) for _ in range(3)]
        for _ in visits:
            await fleet.fail(LlmUnavailable("Gone."))
    (replica,) = {visit.replica for visit in visits}
    fleet.clock.now += 1.01
    assert not replica.is_ejected


async def test_where_all_have_failed_they_are_asked_all_the_same() -> None:
    fleet = await fleet_of(2)
    failed = {await fleet.fail(LlmUnavailable("Gone.")) for _ in range(2)}
    assert len(failed) == 2
    assert fleet.choose("key").address in failed


async def test_errors_that_a_request_deserves_say_nothing_of_the_replica() -> None:
    fleet = await fleet_of(2)
    for error in (InvalidRequest("No."), QueueFull("Later."), DeadlineExceeded("Late.")):
        await fleet.fail(error)
    assert not any(replica.is_ejected for replica in fleet.replicas)


async def test_a_replica_that_fails_at_everything_is_left_alone() -> None:
    fleet = await fleet_of(2)
    for _ in range(2):
        first = await fleet.fail(InternalError("Broken."))
    assert fleet.choose("key").address == first
    await fleet.fail(InternalError("Broken."))
    assert fleet.choose("key").address != first


async def test_a_replica_that_does_not_begin_gets_no_more_until_it_does() -> None:
    fleet = await fleet_of(2, RoutingPolicy(stall_s=2.0))
    async with fleet.visit("key") as visit:
        fleet.clock.now += 1.99
        assert fleet.choose("key") is visit.replica
        fleet.clock.now += 0.02
        assert fleet.choose("key") is not visit.replica
        visit.answered()
        assert fleet.choose("key") is visit.replica


async def test_a_call_that_is_given_up_unanswered_counts_as_a_failure() -> None:
    fleet = await fleet_of(2, RoutingPolicy(stall_s=2.0))
    call = fleet.visit("key")
    visit = await call.__aenter__()
    fleet.clock.now += 2.01
    assert not await call.__aexit__(asyncio.CancelledError, asyncio.CancelledError(), None)
    assert visit.replica.is_ejected


async def test_a_draining_replica_gets_no_new_calls_and_keeps_those_it_has() -> None:
    fleet = await fleet_of(2)
    async with fleet.visit("key") as visit:
        fleet.say(visit.replica.address, serves=False)
        assert fleet.choose("key") is not visit.replica
        others = [replica.address for replica in fleet.replicas if replica is not visit.replica]
        await fleet.now(*others)
        assert not fleet.links[visit.replica.address].is_closed
    await fleet.now(*others)
    assert fleet.links[visit.replica.address].is_closed


async def test_without_any_replica_a_call_waits_for_the_first_one() -> None:
    fleet = FakeFleet([], RoutingPolicy(patience_s=60.0))

    async def ask() -> str:
        async with fleet.visit("key") as visit:
            return visit.replica.address

    asked = asyncio.create_task(ask())
    await asyncio.sleep(0)
    assert not asked.done()
    await fleet.now("10.0.0.1:50")
    assert await asked == "10.0.0.1:50"


async def test_a_stage_without_replicas_is_away() -> None:
    with pytest.raises(LlmUnavailable):
        async with FakeFleet([], PLAIN).visit("key"):
            raise AssertionError("there is nobody to ask")


async def test_a_name_that_cannot_be_resolved_changes_nothing() -> None:
    fleet = await fleet_of(2)
    fleet.addresses = OSError("no such name")
    await fleet.update()
    assert len(fleet.replicas) == 2


async def test_a_lost_replica_is_left_for_another_once() -> None:
    fleet = await fleet_of(3)
    asked: list[str] = []

    async def answer(visit: Visit) -> str:
        asked.append(visit.replica.address)
        raise LlmUnavailable("Gone.")

    with pytest.raises(LlmUnavailable):
        await fleet.ask("key", answer)
    assert len(set(asked)) == len(asked) == 2


async def test_a_full_replica_is_left_for_another_where_there_is_one() -> None:
    async def answer(visit: Visit) -> str:
        if visit.replica.address == first:
            raise QueueFull("Later.")
        return "answered"

    fleet = await fleet_of(2)
    first = fleet.choose("key").address
    assert await fleet.ask("key", answer) == "answered"
    await fleet.now(first)
    with pytest.raises(QueueFull):
        await fleet.ask("key", answer)


async def test_metrics_say_why_replicas_were_chosen_and_how_they_are() -> None:
    registry = PrometheusRegistry()
    fleet = await fleet_of(3, metrics=FleetMetrics.declared(registry))
    first = await fleet.fail(LlmUnavailable("Gone."))
    fleet.choose("key")
    fleet.choose("")
    fleet.say(next(replica.address for replica in fleet.replicas if replica.address != first), serves=False)
    fleet.choose("key")
    picks, states = "internvl_gateway_replica_picks_total", "internvl_gateway_replicas"
    for reason in ("affinity", "overflow", "least_busy", "only"):
        assert registry.value(picks, kind="llm", reason=reason) == 1, reason
    assert registry.value("internvl_gateway_replica_ejections_total", kind="llm") == 1
    assert [registry.value(states, kind="llm", state=state) for state in ("ready", "ejected", "away")] == [1, 1, 1]


# Targets.


async def names(host: str, port: int) -> list[str]:
    return {"llm": ["10.0.0.1", "10.0.0.2"], "six": ["fd00::1"]}[host]


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("llm:50", ["llm:50"]),
        ("dns:///llm:50", ["10.0.0.1:50", "10.0.0.2:50"]),
        ("a:1, b:2", ["a:1", "b:2"]),
        ("dns:///llm:50,10.0.0.2:50,c:3", ["10.0.0.1:50", "10.0.0.2:50", "c:3"]),
        ("dns:///six:50", ["[fd00::1]:50"]),
        ("unix:/run/llm.sock", ["unix:/run/llm.sock"]),
    ],
)
async def test_targets_are_read(text: str, addresses: list[str]) -> None:
    assert [endpoint.address for endpoint in await Targets(text, names).resolve()] == addresses


async def test_replicas_behind_a_name_are_known_by_it() -> None:
    endpoints = await Targets("dns:///llm:50,x:1", names).resolve()
    assert [endpoint.name for endpoint in endpoints] == ["llm", "llm", ""]


@pytest.mark.parametrize("text", ["", "a:1,", "dns:///llm", "dns:///:50"])
def test_a_target_that_nobody_can_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        Targets(text)


async def test_this_machine_is_found_by_name() -> None:
    assert [endpoint.address for endpoint in await Targets("dns:///localhost:50").resolve()] == ["127.0.0.1:50"]


# Keys of prompts.


def turn(*segments: str | VisualSegment, role: Role = Role.USER) -> Turn:
    return Turn(role, tuple(TextSegment(each) if isinstance(each, str) else each for each in segments))


def picture(digest: str) -> VisualSegment:
    return VisualSegment((EmbeddingHandle(digest, 1, 256, b""),))


def test_questions_about_one_picture_go_together() -> None:
    first, second = Prompt(None, (turn(picture("a"), "What?"),)), Prompt(None, (turn(picture("a"), "Where?"),))
    assert affinity_of(first) == affinity_of(second) != affinity_of(Prompt(None, (turn(picture("b"), "What?"),)))


def test_all_turns_of_a_dialogue_go_together() -> None:
    opening = turn("Hi")
    later = Prompt("Be brief.", (opening, turn("Hello", role=Role.ASSISTANT), turn(picture("a"), "And this?")))
    assert affinity_of(Prompt("Be brief.", (opening,))) == affinity_of(later)


def test_a_long_system_message_brings_prompts_together_and_a_short_one_does_not() -> None:
    def keys(system_message: str) -> set[str]:
        return {affinity_of(Prompt(system_message, (turn(word),))) for word in ("one", "two", "three")}

    assert len(keys("You are helpful. " * 100)) == 1
    assert len(keys("You are helpful.")) == 3
