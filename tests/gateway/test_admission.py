"""Who is let in, who waits, who is refused, and that nothing is lost on the way."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from gateway.admission import Admission, AdmissionLimits, Place
from gateway.budgets import TILES, TOKENS, Budgets
from gateway.caller import Caller, admit
from gateway.catalogue import Catalogue, Estimate
from gateway.chat import Chat
from gateway.content import Medium, PreprocessOptions
from gateway.events import (
    CacheTier,
    ChatRequest,
    Finished,
    FinishReason,
    Generated,
    GenerationConfig,
    MediaReceipt,
    TokenUsage,
)
from gateway.keys import TenantLimits
from gateway.metrics import AdmissionMetrics
from gateway.queueing import Pace
from gateway.ranking import Ranking
from gateway.settings import GatewaySettings
from shared.digest import digest_of
from shared.errors import InvalidRequest, MediaNotFound, PromptTooLong, QueueFull, RateLimited, VisionUnavailable
from shared.prometheus import PrometheusRegistry
from shared.rpc.deadline import adopt
from tests.gateway.fakes_gateway import (
    CAT,
    DOG,
    STARTED,
    Gateway,
    Script,
    ask,
    by_digest,
    embedded,
    gateway_without_redis,
    inline,
    user,
)

QUESTION = ask(user("?"), config=GenerationConfig(max_output_tokens=9))  # 10 tokens
IN_BACKGROUND = ask(user("?"), in_background=True)


class Turn:
    """A turn as a task, which runs from when `place` is set until `end`."""

    def __init__(self, admission: Admission, request: ChatRequest = QUESTION, tenant: str = "") -> None:
        self.place: Place | None = None
        self.leave = asyncio.Event()
        self.task = asyncio.create_task(self._run(admission, request, tenant))

    async def _run(self, admission: Admission, request: ChatRequest, tenant: str) -> None:
        admit(Caller(tenant))
        async with admission.turn(request) as self.place:
            await self.leave.wait()

    async def end(self) -> None:
        self.leave.set()
        await self.task
        await settled()

    async def error(self) -> BaseException | None:
        await asyncio.wait([self.task])
        return self.task.exception()


async def settled() -> None:
    """Every task goes on as far as it can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def turns(count: int, admission: Admission, request: ChatRequest = QUESTION, tenant: str = "") -> list[Turn]:
    made = [Turn(admission, request, tenant) for _ in range(count)]
    await settled()
    return made


def running(made: list[Turn]) -> int:
    return sum(turn.place is not None and not turn.task.done() for turn in made)


@asynccontextmanager
async def emptied(admission: Admission, *groups: list[Turn]) -> AsyncIterator[None]:
    """At the end everybody leaves, and the admission is as it was made."""
    yield
    everybody = [turn for group in groups for turn in group]
    for turn in everybody:
        turn.leave.set()
    await asyncio.wait([turn.task for turn in everybody])
    await settled()
    (last,) = await turns(1, admission)
    assert last.place is not None
    await last.end()


async def test_turns_run_up_to_the_limit_and_the_others_in_their_order_as_places_become_free() -> None:
    admission = Admission(AdmissionLimits(running=2))
    made = await turns(5, admission)
    async with emptied(admission, made):
        assert [turn.place is not None for turn in made] == [True, True, False, False, False]
        await made[1].end()
        assert [turn.place is not None for turn in made] == [True, True, True, False, False]
        await made[0].end()
        assert running(made) == 2


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    admission = Admission(AdmissionLimits(running=1, waiting=2), pace=paced(1, 2.0))
    made = await turns(3, admission)
    async with emptied(admission, made):
        refused = await turns(2, admission)
        errors = [await turn.error() for turn in refused]
        assert [type(error) for error in errors] == [QueueFull] * 2
        hints = [error.retry_after_s for error in errors if isinstance(error, QueueFull)]
        assert hints == pytest.approx([6.0, 8.0], abs=0.5)


def paced(places: int, turn_s: float) -> Pace:
    times = iter((0.0, turn_s))
    pace = Pace(places, lambda: next(times, turn_s))
    with pace.turn():
        pass
    return pace


async def test_a_turn_whose_deadline_would_pass_in_the_queue_is_refused_at_once() -> None:
    admission = Admission(AdmissionLimits(running=1), pace=paced(1, 10.0))
    made = await turns(1, admission)
    async with emptied(admission, made):
        adopt(5.0, "short")  # for the tasks that begin here
        (hopeless,) = await turns(1, admission)
        assert isinstance(await hopeless.error(), QueueFull)
        adopt(15.0, "long enough")
        (hopeful,) = await turns(1, admission)
        assert not hopeful.task.done()
        await made[0].end()
        assert hopeful.place is not None
        await hopeful.end()


async def test_those_who_turn_out_to_wait_in_vain_are_told_as_soon_as_that_is_known() -> None:
    clock = Clock()
    admission = Admission(AdmissionLimits(running=1, wait_s=30.0), pace=Pace(1, clock))
    made = await turns(10, admission)  # nobody knows yet how long a turn takes
    async with emptied(admission, made):
        clock.now += 20.0
        await made[0].end()
        errors = [turn.task.exception() for turn in made[1:] if turn.task.done()]
        # Of 30 s are left: room for one, and for a second if the guess is off by half.
        assert [type(error) for error in errors] == [QueueFull] * 6
        assert made[1].place is not None


async def test_nobody_waits_longer_than_the_limit() -> None:
    admission = Admission(AdmissionLimits(running=1, wait_s=0.01))
    made = await turns(1, admission)
    async with emptied(admission, made):
        (waited,) = await turns(1, admission)
        assert isinstance(await waited.error(), QueueFull)


async def test_a_thousand_turns_of_one_tenant_do_not_starve_one_of_another() -> None:
    admission = Admission(AdmissionLimits(running=2, waiting=1000), pace=Pace(2, Clock()))
    many = await turns(1000, admission, tenant="many")
    (one,) = await turns(1, admission, tenant="one")
    async with emptied(admission, many, [one]):
        for _ in range(2):
            await next(turn for turn in many if turn.place and not turn.task.done()).end()
        assert one.place is not None


async def test_a_full_queue_makes_room_for_a_tenant_that_has_asked_for_less() -> None:
    admission = Admission(AdmissionLimits(running=1, waiting=3))
    many = await turns(4, admission, tenant="many")
    (one,) = await turns(1, admission, tenant="one")
    async with emptied(admission, many, [one]):
        assert isinstance(await many[-1].error(), QueueFull)
        assert not any(turn.task.done() for turn in (*many[:-1], one))
        (more,) = await turns(1, admission, tenant="many")
        assert isinstance(await more.error(), QueueFull)


async def test_media_that_waiting_turns_bring_along_are_bounded() -> None:
    admission = Admission(AdmissionLimits(running=1, waiting_bytes=len(CAT) + 1))
    made = await turns(1, admission)
    waiting = await turns(1, admission, ask(user(inline(CAT))))
    async with emptied(admission, made, waiting):
        (too_many,) = await turns(1, admission, ask(user(inline(DOG))))
        assert isinstance(await too_many.error(), QueueFull)
        text = await turns(1, admission, ask(user(inline(b""))))
        assert not text[0].task.done()
        text[0].task.cancel()


async def test_whoever_leaves_while_it_waits_leaves_nothing_behind() -> None:
    admission = Admission(AdmissionLimits(running=1))
    made = await turns(4, admission)
    async with emptied(admission, made):
        made[1].task.cancel()
        await settled()
        await made[0].end()
        assert made[2].place is not None
        # In the very moment in which its place comes.
        made[2].leave.set()
        await asyncio.wait([made[2].task])
        made[3].task.cancel()


async def test_a_place_that_comes_too_late_goes_to_the_next() -> None:
    admission = Admission(AdmissionLimits(running=1))
    made = await turns(3, admission)
    async with emptied(admission, made):
        made[0].leave.set()
        while not made[0].task.done():
            await asyncio.sleep(0)
        made[1].task.cancel()  # has its place already, and has not noticed
        await settled()
        assert made[2].place is not None


async def test_the_background_waits_however_long_and_goes_after_all_others() -> None:
    admission = Admission(AdmissionLimits(running=1, waiting=2, wait_s=0.0001), pace=paced(1, 1000.0))
    made = await turns(1, admission)
    background = await turns(5, admission, IN_BACKGROUND)
    async with emptied(admission, made, background):
        await asyncio.sleep(0.01)  # longer than an interactive turn may wait
        assert not any(turn.task.done() for turn in background)
        await made[0].end()
        assert running(background) == 1


async def test_interactive_turns_go_before_the_background() -> None:
    admission = Admission(AdmissionLimits(running=1))
    made = await turns(1, admission)
    background = await turns(1, admission, IN_BACKGROUND)
    late = await turns(1, admission)
    async with emptied(admission, made, background, late):
        await made[0].end()
        assert (late[0].place is not None, background[0].place) == (True, None)
        await late[0].end()
        assert background[0].place is not None


async def one_after_the_other(admission: Admission, waiting: list[Turn], first: Turn) -> list[Turn]:
    """End whoever runs until nobody waits; return the turns in the order in which they were let in."""
    order, current = [], first
    while True:
        await current.end()
        inside = [turn for turn in waiting if turn.place is not None and not turn.task.done()]
        if not inside:
            return order
        (current,) = inside
        order.append(current)


async def test_the_background_has_a_share_of_the_places_however_many_others_wait() -> None:
    admission = Admission(AdmissionLimits(running=1), pace=Pace(1, Clock()))
    (first,) = await turns(1, admission)
    background = await turns(3, admission, IN_BACKGROUND)
    late = await turns(25, admission)
    async with emptied(admission, background, late):
        order = await one_after_the_other(admission, [*background, *late], first)
        assert [order.index(turn) for turn in background] == [9, 19, 27]


async def test_others_do_not_wait_for_a_share_that_the_background_does_not_ask_for() -> None:
    admission = Admission(AdmissionLimits(running=1), pace=Pace(1, Clock()))
    (first,) = await turns(1, admission)
    early = await turns(15, admission)  # past nobody
    for turn in early[:12]:
        await first.end()
        first = turn
    background = await turns(1, admission, IN_BACKGROUND)
    late = await turns(12, admission)
    async with emptied(admission, early, background, late):
        order = await one_after_the_other(admission, [*early[12:], *background, *late], first)
        assert order.index(background[0]) == 9


async def test_the_share_of_the_background_is_no_more_than_may_run() -> None:
    admission = Admission(AdmissionLimits(running=4, background=1), pace=Pace(4, Clock()))
    background = await turns(3, admission, IN_BACKGROUND)
    made = await turns(40, admission)
    async with emptied(admission, background, made):
        for turn in made[:30]:
            await turn.end()
            assert (running(background), running(made)) == (1, 3)
        await background[0].end()
        assert (background[1].place is not None, background[2].place) == (True, None)


def test_items_of_batches_run_as_far_as_the_settings_say() -> None:
    settings = GatewaySettings(vision_target="a:1", llm_target="b:1", max_batch_concurrency=3)
    assert settings.admission_limits.background == settings.batch_limits.concurrency == 3


async def test_the_background_leaves_half_of_the_places_to_those_who_wait_for_words() -> None:
    admission = Admission(AdmissionLimits(running=4))
    background = await turns(8, admission, IN_BACKGROUND)
    made = await turns(2, admission)
    async with emptied(admission, background, made):
        assert (running(background), running(made)) == (2, 2)
        await background[0].end()
        assert running(background) == 2


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def limited(clock: Clock | None = None, **limits: int) -> Budgets:
    return Budgets(lambda tenant: TenantLimits(**limits) if tenant else TenantLimits(), clock or Clock())


async def test_a_tenant_over_its_budget_is_refused_and_others_are_not() -> None:
    admission = Admission(budgets=limited(requests_per_minute=1))
    admit(Caller("t"))
    made = await turns(1, admission, tenant="t")
    async with emptied(admission, made):
        (refused,) = await turns(1, admission, tenant="t")
        assert isinstance(await refused.error(), RateLimited)
        admit(Caller())


async def test_the_background_of_a_tenant_over_its_budget_waits_until_it_passes() -> None:
    clock, slept = Clock(), []

    async def sleep(delay_s: float) -> None:
        slept.append(delay_s)
        clock.now += delay_s

    admission = Admission(budgets=limited(clock, requests_per_minute=6), sleep=sleep)
    background = await turns(7, admission, IN_BACKGROUND, tenant="t")
    async with emptied(admission, background):
        assert running(background) == 7
        assert slept == [pytest.approx(10.0)]


async def test_a_turn_that_the_queue_refuses_costs_no_budget() -> None:
    admission = Admission(AdmissionLimits(running=1, waiting=0), limited(requests_per_minute=2, tokens_per_minute=25))
    made = await turns(1, admission, tenant="t")
    for _ in range(5):
        (refused,) = await turns(1, admission, tenant="t")
        assert isinstance(await refused.error(), QueueFull)
    await made[0].end()
    (second,) = await turns(1, admission, tenant="t")
    assert second.place is not None
    await second.end()


def tiles_left(budgets: Budgets) -> int:
    """How many tiles of the budget are left, by taking them."""
    taken = 0
    with suppress(RateLimited):
        while True:
            budgets.media("t", 1).end()
            taken += 1
    return taken


async def test_a_bad_request_gives_its_tokens_back_but_not_its_tiles() -> None:
    budgets = limited(tokens_per_minute=100, tiles_per_minute=20)
    admission = Admission(budgets=budgets)
    admit(Caller("t"))
    with pytest.raises(PromptTooLong):
        async with admission.turn(ask(user(inline(CAT)), config=GenerationConfig(max_output_tokens=1000))):
            raise PromptTooLong("Long.")
    async with admission.turn(QUESTION):
        pass
    assert tiles_left(budgets) == 20 - 13


def chat_of(gateway: Gateway, admission: Admission) -> Chat:
    """The gateway's chat with an admission in front."""
    return Chat(
        gateway.llm,
        gateway.encoder,
        gateway.library,
        gateway.conversations,
        gateway.limits,
        Ranking(),
        admission=admission,
    )


def answer_with(usage: TokenUsage) -> Script:
    return [STARTED, Generated(FinishReason.STOP, usage)]


async def test_a_turn_is_charged_what_it_has_used() -> None:
    budgets = limited(tokens_per_minute=1000, tiles_per_minute=20)
    gateway = gateway_without_redis(answer_with(TokenUsage(prompt_tokens=700, output_tokens=100)), cached=[CAT])
    gateway.chat = chat_of(gateway, Admission(budgets=budgets))
    admit(Caller("t"))
    assert isinstance(await gateway.finished(ask(user(inline(CAT)))), Finished)
    assert tiles_left(budgets) == 20  # a cache had its embedding
    with pytest.raises(RateLimited) as caught:
        await gateway.answer(ask(user("?"), config=GenerationConfig(max_output_tokens=299)))
    assert caught.value.quota == TOKENS
    assert caught.value.retry_after_s == pytest.approx(100 * 60 / 1000)


async def test_a_turn_waits_before_any_work_is_done_for_it_and_frees_its_place_however_it_ends() -> None:
    gate = asyncio.Event()
    gateway = gateway_without_redis([STARTED, gate, Generated(FinishReason.STOP)], [VisionUnavailable("Away.")])
    gateway.chat = chat_of(gateway, Admission(AdmissionLimits(running=1)))
    first = asyncio.create_task(gateway.answer(ask(user("one"))))
    await gateway.llm.waiting.wait()
    second = asyncio.create_task(gateway.answer(ask(user(inline(CAT)))))
    third = asyncio.create_task(gateway.answer(ask(user("three"))))
    await settled()
    assert (len(gateway.llm.requests), gateway.vision.finds) == (1, [])
    gate.set()
    await first
    with pytest.raises(VisionUnavailable):
        await second
    assert isinstance((await third)[-1], Finished)


async def test_media_ahead_of_questions_take_tiles_as_far_as_they_had_to_be_made() -> None:
    budgets = limited(tiles_per_minute=20)
    admission = Admission(budgets=budgets)
    admit(Caller("t"))
    medium = Medium(digest_of(CAT))
    with admission.media(medium) as settle:
        settle(embedded(medium, CacheTier.NONE))  # of one tile
    with pytest.raises(MediaNotFound), admission.media(Medium(digest_of(DOG))):
        raise MediaNotFound("Gone.")
    assert tiles_left(budgets) == 19
    with pytest.raises(RateLimited), admission.media(Medium(digest_of(DOG))):
        raise AssertionError("no tile is left")
    with admission.media(medium):  # has been seen
        pass


async def test_prefetching_is_refused_for_what_is_over_the_budget_and_for_nothing_else() -> None:
    gateway = gateway_without_redis()
    admission = Admission(budgets=limited(tiles_per_minute=13))
    catalogue = Catalogue(
        NoFacts(),
        gateway.encoder,
        gateway.library,
        gateway.limits,
        parallel=1,
        max_sent_bytes=1 << 20,
        admission=admission,
    )
    admit(Caller("t"))
    media = [Medium("", content=content) for content in (CAT, DOG)]
    outcomes = {each.index: each.outcome async for each in catalogue.prefetch(media)}
    assert isinstance(outcomes[0], MediaReceipt)
    assert isinstance(outcomes[1], RateLimited)
    assert outcomes[1].quota == TILES


class NoFacts:
    """A vision service that is asked for nothing but embeddings."""

    async def estimate(self, content: bytes, options: PreprocessOptions) -> Estimate:
        raise AssertionError("not asked for")

    async def erase(self, media_digest: str) -> int:
        raise AssertionError("not asked for")


async def test_metrics_say_who_waits_and_why_who_was_refused() -> None:
    registry = PrometheusRegistry()
    admission = Admission(
        AdmissionLimits(running=1, waiting=2), limited(requests_per_minute=1), AdmissionMetrics.declared(registry)
    )
    made = await turns(4, admission)
    poor = await turns(2, admission, tenant="poor")
    async with emptied(admission, made, poor):
        assert [type(await turn.error()) for turn in (made[3], made[2], poor[1])] == [QueueFull, QueueFull, RateLimited]
        assert registry.value("internvl_gateway_turns_waiting", kind="interactive") == 2.0
        assert registry.value("internvl_gateway_refusals_total", reason="full") == 1.0
        assert registry.value("internvl_gateway_refusals_total", reason="displaced") == 1.0
        assert registry.value("internvl_gateway_refusals_total", reason="requests_per_minute") == 1.0
    assert registry.value("internvl_gateway_turns_waiting", kind="interactive") == 0.0
    assert registry.value("internvl_gateway_wait_seconds_count", kind="interactive") == 4.0  # one looks, at the end


@pytest.mark.parametrize("error", [InvalidRequest("Bad."), VisionUnavailable("Away."), asyncio.CancelledError()])
async def test_a_turn_in_progress_counts_until_it_ends_in_whatever_way(error: BaseException) -> None:
    admission = Admission(budgets=limited(concurrent_requests=1))
    admit(Caller("t"))
    for _ in range(3):
        with pytest.raises(type(error)):
            async with admission.turn(by_digest_question()):
                raise error


def by_digest_question() -> ChatRequest:
    return ask(user(by_digest(CAT), "?"))
