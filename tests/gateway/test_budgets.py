"""Budgets of tenants: what passes when, to the moment, and what is given back."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.budgets import CONCURRENT, REQUESTS, TILES, TOKENS, Budgets, TokenBucket
from gateway.keys import TenantLimits
from gateway.weight import Weight
from shared.errors import RateLimited

NOTHING = Weight()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def budgets(clock: Clock, **limits: int) -> Budgets:
    return Budgets(lambda tenant: TenantLimits(**limits) if tenant == "t" else TenantLimits(), clock)


def refused(made: Budgets, weight: Weight = NOTHING, turn_s: float = 2.0) -> tuple[str | None, float]:
    with pytest.raises(RateLimited) as caught:
        made.turn("t", weight, turn_s)
    assert caught.value.retry_after_s is not None
    return caught.value.quota, caught.value.retry_after_s


def test_a_minutes_requests_pass_at_once_and_the_next_when_it_is_said() -> None:
    clock = Clock()
    made = budgets(clock, requests_per_minute=6)
    for _ in range(6):
        made.turn("t", Weight(), 1.0)
    quota, wait_s = refused(made)
    assert (quota, wait_s) == (REQUESTS, pytest.approx(10.0))
    clock.now += wait_s - 0.01
    refused(made)
    clock.now += 0.02
    made.turn("t", Weight(), 1.0)


def test_the_budget_that_takes_longest_is_named() -> None:
    made = budgets(Clock(), requests_per_minute=60, tokens_per_minute=600, tiles_per_minute=60)
    for _ in range(60):
        made.turn("t", Weight(tokens=10, tiles=1), 1.0)
    quota, wait_s = refused(made, Weight(tokens=100, tiles=5))
    assert (quota, wait_s) == (TOKENS, pytest.approx(10.0))
    quota, wait_s = refused(made, Weight(tokens=1, tiles=30))
    assert (quota, wait_s) == (TILES, pytest.approx(30.0))


def test_a_refused_turn_takes_nothing() -> None:
    made = budgets(Clock(), requests_per_minute=2, tokens_per_minute=100)
    made.turn("t", Weight(tokens=100), 1.0)
    refused(made, Weight(tokens=1))
    made.turn("t", Weight(), 1.0)  # the second request is still there


def test_a_turn_larger_than_a_minutes_budget_passes_when_that_is_full() -> None:
    clock = Clock()
    made = budgets(clock, tokens_per_minute=100)
    made.turn("t", Weight(tokens=300), 1.0)
    quota, wait_s = refused(made, Weight(tokens=300))
    assert (quota, wait_s) == (TOKENS, pytest.approx(180.0))
    clock.now += wait_s
    made.turn("t", Weight(tokens=300), 1.0)


def test_a_turn_without_pictures_does_not_wait_for_tiles() -> None:
    made = budgets(Clock(), tiles_per_minute=10)
    made.turn("t", Weight(tiles=100), 1.0)
    made.turn("t", Weight(tokens=100), 1.0)


def test_turns_in_progress_are_counted_until_they_end() -> None:
    made = budgets(Clock(), concurrent_requests=2)
    first = made.turn("t", Weight(), 1.0)
    made.turn("t", Weight(), 1.0)
    assert refused(made, turn_s=3.0) == (CONCURRENT, 1.5)
    first.end()
    made.turn("t", Weight(), 1.0)


def test_what_was_really_used_takes_the_place_of_the_guess() -> None:
    made = budgets(Clock(), tokens_per_minute=100, tiles_per_minute=100)
    made.turn("t", Weight(tokens=100, tiles=100), 1.0).settle(tokens=10, tiles=0)
    made.turn("t", Weight(tokens=90, tiles=100), 1.0).settle(tokens=110)  # more than was guessed
    assert refused(made, Weight(tokens=1)) == (TOKENS, pytest.approx(21 * 0.6))


def test_what_is_undone_was_never_taken() -> None:
    made = budgets(Clock(), requests_per_minute=1, tokens_per_minute=100, tiles_per_minute=10)
    made.turn("t", Weight(tokens=100, tiles=10), 1.0).undo()
    made.turn("t", Weight(tokens=100, tiles=10), 1.0)


def test_media_alone_take_tiles_and_no_request() -> None:
    made = budgets(Clock(), requests_per_minute=1, concurrent_requests=1, tiles_per_minute=10)
    made.media("t", 10)
    with pytest.raises(RateLimited):
        made.media("t", 1)
    made.turn("t", Weight(), 1.0)


def test_tenants_do_not_pay_for_one_another_and_without_limits_nobody_pays() -> None:
    made = Budgets(lambda tenant: TenantLimits(requests_per_minute=1) if tenant else TenantLimits(), Clock())
    made.turn("one", Weight(), 1.0)
    made.turn("other", Weight(), 1.0)
    for _ in range(10):
        made.turn("", Weight(tokens=10**9), 1.0)


def test_a_changed_limit_holds_from_the_next_turn_on_and_forgives_nothing() -> None:
    limits = {"t": TenantLimits(tokens_per_minute=100)}
    clock = Clock()
    made = Budgets(lambda tenant: limits[tenant], clock)
    made.turn("t", Weight(tokens=90), 1.0)
    limits["t"] = TenantLimits(tokens_per_minute=200)
    made.turn("t", Weight(tokens=110), 1.0)
    assert refused(made, Weight(tokens=1))[0] == TOKENS
    limits["t"] = TenantLimits()
    made.turn("t", Weight(tokens=10**6), 1.0)


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.floats(0, 30), st.integers(0, 300)), max_size=30),
)
def test_no_more_passes_in_any_time_than_a_bucket_and_what_has_flowed_in(
    per_minute: int, asked: list[tuple[float, int]]
) -> None:
    clock = Clock()
    bucket = TokenBucket(per_minute, clock)
    passed, most = 0, 0
    for pause_s, amount in asked:
        clock.now += pause_s
        if bucket.wait_s(amount) == 0.0:
            bucket.take(amount)
            passed, most = passed + amount, max(most, amount)
    # The last one may be larger than a full bucket.
    assert passed <= per_minute + (clock.now - 1000.0) * per_minute / 60.0 + most + 1e-6


@given(st.integers(1, 1000), st.integers(0, 2000), st.integers(1, 2000))
def test_a_wait_is_exact(per_minute: int, taken: int, amount: int) -> None:
    clock = Clock()
    bucket = TokenBucket(per_minute, clock)
    bucket.take(taken)
    wait_s = bucket.wait_s(amount)
    clock.now += wait_s
    assert math.isclose(bucket.wait_s(amount), 0.0, abs_tol=1e-6)
    if wait_s > 0.001:
        clock.now -= 0.001
        early = TokenBucket(per_minute, clock)
        early.take(taken)
        clock.now += wait_s - 0.001
        assert early.wait_s(amount) > 0.0
