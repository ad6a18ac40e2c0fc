"""A queue that is fair to tenants, and what it is known to move at."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.queueing import FairQueue, Pace


def emptied(queue: FairQueue[str]) -> list[str]:
    return [queue.pop() for _ in range(len(queue))]


def test_one_tenant_is_served_in_the_order_in_which_it_came() -> None:
    queue = FairQueue[str]()
    for name in "abcd":
        queue.push("t", 10.0, name)
    assert emptied(queue) == list("abcd")


def test_a_thousand_requests_of_one_tenant_do_not_hold_up_one_of_another() -> None:
    queue = FairQueue[str]()
    for number in range(1000):
        queue.push("many", 10.0, f"many {number}")
    assert queue.ahead_of("one") == 1
    queue.push("one", 10.0, "one")
    assert emptied(queue).index("one") == 1


def test_also_when_the_other_comes_late() -> None:
    queue = FairQueue[str]()
    for number in range(1000):
        queue.push("many", 10.0, f"many {number}")
    for _ in range(300):
        queue.pop()
    queue.push("one", 10.0, "one")
    assert emptied(queue).index("one") <= 1


def test_shares_are_of_work_and_not_of_requests() -> None:
    queue = FairQueue[str]()
    for _ in range(20):
        queue.push("heavy", 100.0, "heavy")
        queue.push("light", 25.0, "light")
    first = emptied(queue)[:20]
    assert first.count("light") == pytest.approx(4 * first.count("heavy"), abs=4)


def test_a_tenant_saves_no_turns_up_while_it_is_away() -> None:
    queue = FairQueue[str]()
    for _ in range(100):
        queue.push("there", 10.0, "there")
    for _ in range(50):
        queue.pop()
    for _ in range(50):
        queue.push("new", 10.0, "new")
    assert 9 <= emptied(queue)[:20].count("new") <= 11


def test_the_last_belongs_to_whoever_has_asked_for_most() -> None:
    queue = FairQueue[str]()
    for number in range(5):
        queue.push("many", 10.0, f"many {number}")
    queue.push("one", 10.0, "one")
    assert queue.drop_last() == "many 4"
    assert queue.ahead_of("many") == len(queue)
    assert queue.ahead_of("one") < len(queue)


def test_what_is_removed_is_not_paid_for() -> None:
    queue = FairQueue[str]()
    gone = queue.push("a", 1000.0, "gone")
    queue.remove(gone)
    queue.remove(gone)
    queue.push("a", 10.0, "a")
    queue.push("b", 10.0, "b")
    assert emptied(queue) == ["a", "b"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 100)), max_size=60), st.data())
def test_everything_that_is_pushed_comes_out_once_and_each_tenants_in_order(
    pushed: list[tuple[str, int]], data: st.DataObject
) -> None:
    queue = FairQueue[tuple[str, int]]()
    out, tickets = [], {}
    for number, (tenant, cost) in enumerate(pushed):
        tickets[number] = queue.push(tenant, float(cost), (tenant, number))
        match data.draw(st.integers(0, 3)):
            case 0:
                out.append(queue.pop())
            case 1:
                gone = data.draw(st.sampled_from(sorted(tickets)))
                before = len(queue)
                queue.remove(tickets.pop(gone))
                if len(queue) < before:
                    out.append((pushed[gone][0], gone))
    rest = [queue.pop() for _ in range(len(queue))]
    assert sorted(number for _, number in out + rest) == list(range(len(pushed)))
    for tenant in "abc":
        numbers = [number for owner, number in rest if owner == tenant]
        assert numbers == sorted(numbers)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def note(pace: Pace, clock: Clock, held_s: float) -> None:
    with pace.turn():
        clock.now += held_s


def test_the_pace_follows_how_long_turns_take() -> None:
    clock = Clock()
    pace = Pace(4, clock)
    assert pace.wait_s(1000) == 0.0  # nobody knows
    note(pace, clock, 2.0)
    assert pace.wait_s(0) == 0.5
    assert pace.wait_s(7) == 4.0
    for _ in range(100):
        note(pace, clock, 4.0)
    assert pace.turn_s == pytest.approx(4.0, rel=0.01)


def test_turns_that_do_not_end_are_known_to_take_long() -> None:
    clock = Clock()
    pace = Pace(2, clock)
    note(pace, clock, 1.0)
    with pace.turn(), pace.turn():
        clock.now += 50.0
        assert pace.wait_s(0) == 25.0
    note(pace, clock, 1.0)
    assert pace.turn_s < 11.0


def test_those_who_are_refused_together_come_back_one_after_another() -> None:
    clock = Clock()
    pace = Pace(10, clock)
    note(pace, clock, 1.0)
    hints = [pace.promise(20) for _ in range(5)]
    assert hints == pytest.approx([2.1, 2.2, 2.3, 2.4, 2.5])
    clock.now += 10.0
    assert pace.promise(0) == pytest.approx(0.1)


def test_nobody_is_sent_away_for_ever() -> None:
    clock = Clock()
    pace = Pace(1, clock)
    note(pace, clock, 100.0)
    assert [pace.promise(1000) for _ in range(3)] == [60.0] * 3
