"""A part stalls when it has work and takes no steps; a part without work never does."""

import itertools

from shared.stall import Progress, Stall


def test_a_part_with_work_and_no_steps_has_stood_still_since_it_was_first_seen_so() -> None:
    stall = Stall(period_s=2.0)
    assert [stall.check(Progress(7, has_work=True)) for _ in range(4)] == [0, 2, 4, 6]


def test_a_step_ends_the_stall() -> None:
    stall = Stall(period_s=1.0)
    steps = [1, 1, 1, 2, 2]
    assert [stall.check(Progress(num_steps, has_work=True)) for num_steps in steps] == [0, 1, 2, 0, 1]


def test_an_idle_part_and_a_busy_one_never_stall() -> None:
    idle, busy = Stall(period_s=1.0), Stall(period_s=1.0)
    for num_steps in itertools.islice(itertools.count(), 1000):
        assert idle.check(Progress(5, has_work=False)) == 0
        assert busy.check(Progress(num_steps, has_work=True)) == 0


def test_time_without_work_does_not_count() -> None:
    stall = Stall(period_s=1.0)
    works = [True, True, False, True, True]
    assert [stall.check(Progress(1, has_work=has_work)) for has_work in works] == [0, 1, 0, 0, 1]
