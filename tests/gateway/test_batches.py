"""Batches over a real store, with scripted answers."""

import asyncio
import gc
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from gateway.admission import Admission, AdmissionLimits
from gateway.batch_store import Batch, BatchState, BatchStore
from gateway.batches import Batches, BatchLimits, ItemAnswer, ItemFormat, NewBatch
from gateway.budgets import Budgets
from gateway.caller import Caller, admit
from gateway.events import (
    Candidate,
    CandidateResult,
    ChatEvent,
    ChatRequest,
    ChatTimings,
    Delta,
    Finished,
    FinishReason,
    Generated,
)
from gateway.keys import TenantLimits
from gateway.media import LocalMediaCache, MediaLibrary, RedisMediaStore
from shared.digest import digest_of
from shared.errors import (
    BatchNotFound,
    InvalidRequest,
    LlmUnavailable,
    NoCritic,
    QueueFull,
    ServiceError,
    StoreUnavailable,
)
from shared.rpc.deadline import adopt, remaining_s, request_id
from tests.gateway.fakes_gateway import CAT, STARTED, redis_of, user, valkey

STOP = FinishReason.STOP


class FakeChat:
    """Answers a question with itself in capitals; what `errors` names fails first, `hold` makes all wait."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.ids: list[str] = []
        self.deadlines: set[float | None] = set()
        self.in_background: set[bool] = set()
        self.errors: dict[str, list[Exception]] = {}
        self.hold: asyncio.Event | None = None
        self.running = self.most_running = self.cancelled = 0

    async def answer(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        question = request.messages[-1].text
        self.asked.append(question)
        self.ids.append(request_id())
        self.deadlines.add(remaining_s())
        self.in_background.add(request.in_background)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            yield STARTED
            if self.hold and not question.startswith("quick"):
                await self.hold.wait()
            await asyncio.sleep(0)
            if errors := self.errors.get(question):
                raise errors.pop(0)
            yield Delta(question.upper())
            yield Finished(Generated(STOP), ChatTimings(0, 0, 0), (Candidate(question.upper(), CandidateResult(STOP)),))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


class AdmittedChat(FakeChat):
    """Answers behind an admission: `background` items at once; of tenant `poor` one a minute."""

    def __init__(self, background: int) -> None:
        super().__init__()
        limits = {"poor": TenantLimits(requests_per_minute=1)}
        budgets = Budgets(lambda tenant: limits.get(tenant, TenantLimits()))
        self.admission = Admission(AdmissionLimits(background=background), budgets)

    async def answer(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        async with self.admission.turn(request), aclosing(super().answer(request)) as events:
            async for event in events:
                yield event


class JsonFormat:
    """Items are their question; results are JSON. What is no text is malformed."""

    def read_item(self, value: bytes) -> ChatRequest:
        try:
            return ChatRequest((user(value.decode()),))
        except UnicodeDecodeError:
            raise InvalidRequest("No question.", field="messages") from None

    def write_result(self, index: int, outcome: ItemAnswer | ServiceError) -> bytes:
        told = outcome.reason if isinstance(outcome, ServiceError) else "".join(delta.text for delta in outcome.deltas)
        return json.dumps([index, told]).encode()


class FailingFormat(JsonFormat):
    """Fails at every result, as no format may."""

    def write_result(self, index: int, outcome: ItemAnswer | ServiceError) -> bytes:
        raise ValueError("a bug")


Make = Callable[..., Batches]


@pytest.fixture
async def make(redis: Redis) -> AsyncIterator[Make]:
    """Makes gateways over one store; all are closed at the end."""
    made: list[Batches] = []

    def new(
        chat: FakeChat, lease_s: float = 15.0, form: ItemFormat | None = None, rest_s: float = 30.0, **limits: Any
    ) -> Batches:
        library = MediaLibrary(RedisMediaStore(redis, 60), LocalMediaCache(1 << 20), 1 << 20)
        store = BatchStore(redis, lease_s)
        form = form or JsonFormat()
        made.append(Batches(chat, library, store, form, BatchLimits(**limits), 0.05, (0.0, 0.0), rest_s))
        return made[-1]

    yield new
    for batches in made:
        await batches.close()


def questions(*words: str, **more: Any) -> NewBatch:
    return NewBatch(tuple(word.encode() for word in words), {}, **more)


async def results_of(batches: Batches, batch: Batch) -> list[tuple[int, str]]:
    found = [json.loads(result) async for result in batches.results(batch.batch_id)]
    return [(index, told) for index, told in found]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_every_item_is_answered(make: Make) -> None:
    chat = FakeChat()
    batches = make(chat)
    batch = await batches.create(questions("a", "b", "c"))
    assert (batch.state, batch.item_count) == (BatchState.RUNNING, 3)
    assert sorted(await results_of(batches, batch)) == [(0, "A"), (1, "B"), (2, "C")]
    found = await batches.get(batch.batch_id)
    assert (found.state, found.succeeded_count, found.failed_count) == (BatchState.DONE, 3, 0)
    assert len(chat.asked) == 3


async def test_an_item_that_fails_fails_alone(make: Make) -> None:
    chat = FakeChat()
    chat.errors = {"b": [NoCritic("No.")], "c": [ValueError("a library's words")]}
    batches = make(chat)
    batch = await batches.create(NewBatch((b"a", b"b", b"c", b"\xff", b"e"), {}))
    assert sorted(await results_of(batches, batch)) == [
        (0, "A"),
        (1, "NO_CRITIC"),
        (2, "INTERNAL"),
        (3, "INVALID_REQUEST"),
        (4, "E"),
    ]
    found = await batches.get(batch.batch_id)
    assert (found.state, found.succeeded_count, found.failed_count) == (BatchState.DONE, 2, 3)


async def test_overload_and_absence_are_waited_for(make: Make) -> None:
    chat = FakeChat()
    chat.errors = {
        "a": [QueueFull("Later."), LlmUnavailable("Away.")],
        "b": [QueueFull("Later."), QueueFull("Later."), QueueFull("Later.")],
    }
    batches = make(chat)
    batch = await batches.create(questions("a", "b"))
    assert sorted(await results_of(batches, batch)) == [(0, "A"), (1, "QUEUE_FULL")]
    assert sorted(chat.asked) == ["a"] * 3 + ["b"] * 3


async def test_results_come_as_items_end(make: Make) -> None:
    chat = FakeChat()
    chat.hold = asyncio.Event()
    batches = make(chat)
    batch = await batches.create(questions("slow", "quick"))
    results = batches.results(batch.batch_id)
    assert json.loads(await anext(results)) == [1, "QUICK"]
    assert (await batches.get(batch.batch_id)).state is BatchState.RUNNING
    chat.hold.set()
    assert [json.loads(result) async for result in results] == [[0, "SLOW"]]


@pytest.mark.parametrize(("asked", "most"), [(0, 3), (2, 2), (100, 3)])
async def test_only_so_many_items_run_at_a_time(make: Make, asked: int, most: int) -> None:
    chat = FakeChat()
    chat.hold = asyncio.Event()
    batches = make(chat, concurrency=3)
    batch = await batches.create(questions(*map(str, range(20)), concurrency=asked))
    await until(lambda: chat.running == most)
    chat.hold.set()
    assert len(await results_of(batches, batch)) == 20
    assert chat.most_running == most


async def test_all_batches_of_a_gateway_share_its_room(make: Make) -> None:
    chat = FakeChat()
    chat.hold = asyncio.Event()
    batches = make(chat, concurrency=2)
    made = [await batches.create(questions(*map(str, range(8)))) for _ in range(3)]
    await until(lambda: chat.running == 2)
    chat.hold.set()
    for batch in made:
        assert len(await results_of(batches, batch)) == 8
    assert chat.most_running == 2


async def created_by(tenant: str, batches: Batches, *words: str) -> Batch:
    admit(Caller(tenant))
    return await batches.create(questions(*words))


async def test_a_tenant_whose_budget_is_empty_holds_up_no_batch_of_another(make: Make) -> None:
    chat = AdmittedChat(background=2)
    batches = make(chat, concurrency=2)
    waiting = [await created_by("poor", batches, *"abcd") for _ in range(3)]
    await until(lambda: len(chat.asked) == 1)  # and the others have to wait for minutes
    for tenant in ("rich", "other"):
        batch = await created_by(tenant, batches, *"wxyz")
        async with asyncio.timeout(20):
            assert len(await results_of(batches, batch)) == 4
    admit(Caller("poor"))
    found = [await batches.get(batch.batch_id) for batch in waiting]
    assert [batch.state for batch in found] == [BatchState.RUNNING] * 3
    assert sum(batch.succeeded_count for batch in found) == 1


async def test_batches_of_all_tenants_share_what_a_gateway_asks_at_once(make: Make) -> None:
    chat = AdmittedChat(background=3)
    chat.hold = asyncio.Event()
    batches = make(chat, concurrency=3)
    made = {tenant: await created_by(tenant, batches, *map(str, range(8))) for tenant in ("a", "b", "c")}
    await until(lambda: len(chat.admission._background) == 6)  # and of each tenant no more than its room wait
    assert chat.running == 3
    chat.hold.set()
    for tenant, batch in made.items():
        admit(Caller(tenant))
        assert len(await results_of(batches, batch)) == 8
    assert chat.most_running == 3


async def test_one_item_does_not_wait_for_all_those_of_a_tenant_that_asks_for_much(make: Make) -> None:
    chat = AdmittedChat(background=1)
    chat.hold = asyncio.Event()
    batches = make(chat, concurrency=4)
    for _ in range(3):
        await created_by("many", batches, *"abcdefgh")
    await until(lambda: len(chat.admission._background) == 3)
    one = await created_by("one", batches, "x")
    await until(lambda: len(chat.admission._background) == 4)
    chat.hold.set()
    assert await results_of(batches, one) == [(0, "X")]
    assert chat.asked.index("x") <= 2


async def test_nothing_is_remembered_of_a_tenant_whose_batches_have_ended(make: Make) -> None:
    chat = AdmittedChat(background=2)
    chat.hold = asyncio.Event()
    batches = make(chat)
    batch = await created_by("rich", batches, *"abc")
    await until(lambda: chat.running == 2)
    assert list(batches._rooms) == ["rich"]
    chat.hold.set()
    await results_of(batches, batch)
    await until(lambda: not batches._tasks)
    gc.collect()
    assert list(batches._rooms) == []


async def test_a_batch_goes_on_without_its_caller(make: Make) -> None:
    chat = FakeChat()
    chat.hold = asyncio.Event()
    batches = make(chat)
    created: list[Batch] = []

    async def call() -> None:
        adopt(0.001, "call-1")  # a deadline that passes at once
        created.append(await batches.create(questions("a", "b")))

    await asyncio.create_task(call())
    reader = asyncio.create_task(results_of(batches, created[0]))
    await until(lambda: chat.running == 2)
    reader.cancel()
    chat.hold.set()
    assert len(await results_of(batches, created[0])) == 2
    assert (chat.cancelled, chat.deadlines, chat.in_background) == (0, {None}, {True})
    assert sorted(chat.ids) == ["call-1.0", "call-1.1"]


async def test_a_cancelled_batch_keeps_what_it_has(make: Make) -> None:
    chat = FakeChat()
    chat.hold = asyncio.Event()
    batches = make(chat)
    batch = await batches.create(questions("quick", "slow", "slower"))
    await until(lambda: chat.running == 2)
    assert await anext(batches.results(batch.batch_id))
    ended = await batches.cancel(batch.batch_id)
    assert (ended.state, ended.succeeded_count) == (BatchState.CANCELLED, 1)
    assert await results_of(batches, batch) == [(0, "QUICK")]
    await until(lambda: chat.cancelled == 2)
    assert (await batches.get(batch.batch_id)).state is BatchState.CANCELLED


async def test_a_batch_that_is_cancelled_twice_is_given_back(make: Make, redis: Redis) -> None:
    for _ in range(10):
        chat = FakeChat()
        chat.hold = asyncio.Event()
        batches = make(chat)
        batch = await batches.create(questions("a", "b"))
        await until(lambda chat=chat: chat.running == 2)  # type: ignore[misc]
        await asyncio.gather(*(batches.cancel(batch.batch_id) for _ in range(3)))
        await until(lambda batches=batches: not batches._tasks)  # type: ignore[misc]
        assert batches._running == {}
        assert not await redis.exists(f"ivl:batch:{{{batch.batch_id}}}:lease")


async def test_a_task_that_is_cancelled_again_and_again_gives_its_batch_back(make: Make, redis: Redis) -> None:
    chat = FakeChat()
    chat.hold = asyncio.Event()
    batches = make(chat)
    batch = await batches.create(questions("a"))
    await until(lambda: chat.running == 1)
    (task,) = batches._tasks
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)
    await batches.close()
    assert (batches._running, chat.running) == ({}, 0)
    assert not await redis.exists(f"ivl:batch:{{{batch.batch_id}}}:lease")


async def test_a_batch_that_is_ended_before_it_began_is_given_back(make: Make, redis: Redis) -> None:
    batches = make(FakeChat())
    held = await BatchStore(redis, 15.0).create([b"a"], 1, 60, "call-1")
    batches._start(held)
    await batches.close()
    assert batches._running == {}
    assert not await redis.exists(f"ivl:batch:{{{held.batch_id}}}:lease")


async def test_another_gateway_can_end_a_batch(make: Make, redis: Redis) -> None:
    chat = FakeChat()
    chat.hold = asyncio.Event()
    worker, other = make(chat, lease_s=0.6), make(FakeChat())
    batch = await worker.create(questions("slow"))
    await until(lambda: chat.running == 1)
    assert (await other.cancel(batch.batch_id)).state is BatchState.CANCELLED
    await until(lambda: chat.cancelled == 1)
    assert await redis.hlen(f"ivl:batch:{{{batch.batch_id}}}:results") == 0


async def test_a_batch_that_is_done_stays_done(make: Make) -> None:
    batches = make(FakeChat())
    batch = await batches.create(questions("a"))
    await results_of(batches, batch)
    assert (await batches.cancel(batch.batch_id)).state is BatchState.DONE


async def test_a_gateway_that_dies_is_replaced_by_one_that_is_asked(make: Make, redis: Redis) -> None:
    first, second = FakeChat(), FakeChat()
    first.hold = asyncio.Event()
    dying, other = make(first), make(second)
    batch = await dying.create(questions("quick", "slow", "slower"))
    await until(lambda: first.running == 2)
    assert await anext(dying.results(batch.batch_id))
    # While its hold lasts nobody else begins.
    await other.get(batch.batch_id)
    assert second.asked == []
    await redis.delete(f"ivl:batch:{{{batch.batch_id}}}:lease")  # as if it had run out
    assert sorted(await results_of(other, batch)) == [(0, "QUICK"), (1, "SLOW"), (2, "SLOWER")]
    assert sorted(second.asked) == ["slow", "slower"]
    # What the first one comes to later counts no more.
    first.hold.set()
    await until(lambda: first.running == 0)
    found = await other.get(batch.batch_id)
    assert (found.state, found.succeeded_count) == (BatchState.DONE, 3)


async def test_a_gateway_that_stops_gives_its_batches_back(make: Make) -> None:
    first, second = FakeChat(), FakeChat()
    first.hold = asyncio.Event()
    stopping, other = make(first), make(second)
    batch = await stopping.create(questions("a", "b"))
    await until(lambda: first.running == 2)
    await stopping.close()
    assert first.cancelled == 2
    assert not (await other.get(batch.batch_id)).is_held
    assert sorted(await results_of(other, batch)) == [(0, "A"), (1, "B")]


async def test_a_hold_is_renewed_while_items_run(make: Make) -> None:
    chat, other_chat = FakeChat(), FakeChat()
    chat.hold = asyncio.Event()
    batches, other = make(chat, lease_s=1.5), make(other_chat)
    batch = await batches.create(questions("slow", ttl_s=1))
    await asyncio.sleep(2.5)
    assert (await other.get(batch.batch_id)).is_held
    chat.hold.set()
    assert await results_of(batches, batch) == [(0, "SLOW")]
    assert other_chat.asked == []


async def test_a_batch_is_kept_for_as_long_as_asked(make: Make, redis: Redis) -> None:
    batches = make(FakeChat(), ttl_s=500)
    for new, ttl_s in ((questions("a", ttl_s=100), 100), (questions("a"), 500)):
        batch = await batches.create(new)
        await results_of(batches, batch)
        for key in await redis.keys(f"ivl:batch:{{{batch.batch_id}}}*"):
            if not key.endswith(b":lease"):
                assert ttl_s - 20 <= await redis.ttl(key) <= ttl_s
        left = (await batches.get(batch.batch_id)).expire_time - batch.create_time
        assert ttl_s - 20 <= left.total_seconds() <= ttl_s + 20


async def test_media_that_came_along_are_in_the_store(make: Make, redis: Redis) -> None:
    batches = make(FakeChat())
    await batches.create(NewBatch((b"a",), {digest_of(CAT): CAT}, ttl_s=1000))
    assert 900 <= await redis.ttl(f"ivl:media:{digest_of(CAT)}") <= 1000


@pytest.mark.parametrize(
    ("new", "field"),
    [
        (questions(), "items"),
        (questions(*"abcd"), "items"),
        (questions("x" * 101), "items"),
        (questions("a", concurrency=-1), "concurrency"),
        (questions("a", ttl_s=0), "ttl"),
        (questions("a", ttl_s=31 * 86_400), "ttl"),
    ],
)
async def test_a_batch_over_a_limit_is_refused(make: Make, redis: Redis, new: NewBatch, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await make(FakeChat(), items=3, item_bytes=100).create(new)
    assert caught.value.field == field
    assert await redis.keys("*") == []


async def test_a_gateway_takes_on_only_so_many_batches(make: Make) -> None:
    chat = FakeChat()
    chat.hold = asyncio.Event()
    batches = make(chat, running=1)
    first = await batches.create(questions("slow"))
    with pytest.raises(QueueFull):
        await batches.create(questions("a"))
    chat.hold.set()
    await results_of(batches, first)
    await until(lambda: not batches._running)
    await batches.create(questions("a"))


async def test_batches_that_come_together_get_no_more_places_than_there_are(make: Make) -> None:
    chat = FakeChat()
    chat.hold = asyncio.Event()
    batches = make(chat, running=2)
    made = await asyncio.gather(*(batches.create(questions("slow")) for _ in range(6)), return_exceptions=True)
    assert [type(each) for each in made].count(QueueFull) == 4
    assert len(batches._running) == 2


async def test_batches_that_are_taken_over_together_get_no_more_places_than_there_are(make: Make, redis: Redis) -> None:
    chat = FakeChat()
    chat.hold = asyncio.Event()
    batches, store = make(chat, running=1), BatchStore(redis, 15.0)
    left = [await store.create([b"slow"], 1, 60, "call-1") for _ in range(6)]
    await asyncio.gather(*(held.release() for held in left))
    await asyncio.gather(*(batches.get(held.batch_id) for held in left))
    assert len(batches._running) == 1
    assert [(await store.get(held.batch_id)).is_held for held in left].count(True) == 1


async def test_a_batch_that_cannot_be_written_down_leaves_its_place_free(make: Make) -> None:
    batches = make(FakeChat(), running=1)
    for _ in range(3):
        making = asyncio.create_task(batches.create(questions("a")))
        await asyncio.sleep(0)
        making.cancel()
        with pytest.raises(asyncio.CancelledError):
            await making
    await results_of(batches, await batches.create(questions("a")))


async def test_what_is_in_the_store_of_a_batch_is_never_there_for_ever(make: Make, redis: Redis) -> None:
    # A caller may give up at any moment, and a gateway may die.
    batches = make(FakeChat(), item_bytes=1 << 30)
    new = NewBatch(tuple(b"x" * 900_000 for _ in range(20)), {}, ttl_s=100)
    async with asyncio.TaskGroup() as group:
        making = group.create_task(batches.create(new))
        while not making.done():
            for key in await redis.keys("*"):
                assert await redis.ttl(key) != -1


async def test_a_batch_that_a_gateway_failed_at_is_left_alone_for_a_while(make: Make) -> None:
    chat, eager = FakeChat(), FakeChat()
    batches = make(chat, form=FailingFormat())
    batch = await batches.create(questions("a"))
    await until(lambda: not batches._tasks)
    for _ in range(3):
        assert not (await batches.get(batch.batch_id)).is_held
    assert (chat.asked, batches._running) == (["a"], {})
    # Once it has rested it is taken over, and so it is by others at any time.
    other = make(eager, form=FailingFormat(), rest_s=0.0)
    for times in (1, 2):
        await other.get(batch.batch_id)
        await until(lambda times=times: len(eager.asked) == times and not other._tasks)  # type: ignore[misc]
    assert sorted(await results_of(make(FakeChat()), batch)) == [(0, "A")]


async def test_an_answer_waits_for_a_store_that_is_full_and_is_not_asked_for_again() -> None:
    chat = FakeChat()
    chat.hold = asyncio.Event()
    with valkey() as server:
        redis = redis_of(server.connection_url)
        library = MediaLibrary(RedisMediaStore(redis, 60), LocalMediaCache(1 << 20), 1 << 20)
        batches = Batches(chat, library, BatchStore(redis, 0.6), JsonFormat(), BatchLimits(), 0.05, [0.0, 0.05])
        batch = await batches.create(questions("a", "b", "c"))
        await until(lambda: chat.running == 3)
        await redis.config_set("maxmemory", "1")
        chat.hold.set()
        await until(lambda: chat.running == 0)
        reading = asyncio.create_task(results_of(batches, batch))
        await asyncio.sleep(1.0)  # longer than a hold, and than all patience
        assert (await batches.get(batch.batch_id)).is_held
        await redis.config_set("maxmemory", "0")
        assert sorted(await reading) == [(0, "A"), (1, "B"), (2, "C")]
        assert sorted(chat.asked) == ["a", "b", "c"]
        await batches.close()
        await redis.aclose()


async def test_the_log_names_no_batch_by_what_lets_people_read_it(make: Make) -> None:
    with capture_logs() as events:
        batches = make(FakeChat(), form=FailingFormat(), rest_s=0.0)
        batch = await batches.create(questions("a"))
        await until(lambda: not batches._tasks)
        await batches.get(batch.batch_id)
        await batches.close()
        made = make(FakeChat())
        await results_of(made, await made.create(questions("b")))
        await until(lambda: not made._tasks)
    assert {event["event"] for event in events} >= {
        "batch_created",
        "batch_failed",
        "batch_taken_over",
        "batch_finished",
    }
    assert batch.batch_id not in repr(events)
    names = {event["batch"] for event in events if event["event"] in ("batch_created", "batch_failed")}
    assert all(re.fullmatch(r"[0-9a-f]{12}", name) for name in names)


async def test_items_of_a_call_with_the_longest_id_have_ids_that_show_it(make: Make) -> None:
    chat = FakeChat()
    batches = make(chat)
    created: list[Batch] = []

    async def call() -> None:
        adopt(None, "x" * 128)
        created.append(await batches.create(questions(*"abcdefghijkl")))

    await asyncio.create_task(call())
    await results_of(batches, created[0])
    assert set(chat.ids) == {f"{'x' * (127 - len(str(index)))}.{index}" for index in range(12)}


@pytest.mark.parametrize("batch_id", ["", "x", "a" * 32, "*" * 32, "a}:items" * 4])
async def test_an_unknown_batch_is_not_found(make: Make, redis: Redis, batch_id: str) -> None:
    batches = make(FakeChat())
    for call in (batches.get(batch_id), batches.cancel(batch_id), anext(batches.results(batch_id))):
        with pytest.raises(BatchNotFound):
            await call
    assert await redis.keys("*") == []


@pytest.mark.parametrize("about", [b"{}", b"nonsense"])
async def test_a_damaged_batch_is_not_found(make: Make, redis: Redis, about: bytes) -> None:
    batches = make(FakeChat())
    batch = await batches.create(questions("a"))
    await results_of(batches, batch)
    await redis.hset(f"ivl:batch:{{{batch.batch_id}}}", "about", about)
    with pytest.raises(BatchNotFound):
        await batches.get(batch.batch_id)


async def test_without_a_store_there_is_no_batch() -> None:
    redis = redis_of("redis://127.0.0.1:1")
    library = MediaLibrary(RedisMediaStore(redis, 60), LocalMediaCache(1 << 20), 1 << 20)
    batches = Batches(FakeChat(), library, BatchStore(redis, 15.0), JsonFormat(), BatchLimits(), 0.05, (0.0,))
    for call in (batches.create(questions("a")), batches.get("a" * 32), batches.cancel("a" * 32)):
        with pytest.raises(StoreUnavailable):
            await call


async def test_a_store_that_is_lost_in_the_middle_loses_no_item(tmp_path: Any) -> None:
    chat = FakeChat()
    chat.hold = asyncio.Event()
    with valkey() as server:
        redis = redis_of(server.connection_url)
        library = MediaLibrary(RedisMediaStore(redis, 60), LocalMediaCache(1 << 20), 1 << 20)
        batches = Batches(chat, library, BatchStore(redis, 15.0), JsonFormat(), BatchLimits(), 0.05, [0.2] * 100)
        batch = await batches.create(questions("a", "b"))
        await until(lambda: chat.running == 2)
        server._process.send_signal(19)  # frozen
        chat.hold.set()
        await until(lambda: chat.running == 0)
        server._process.send_signal(18)
        assert sorted(await results_of(batches, batch)) == [(0, "A"), (1, "B")]
        found = await batches.get(batch.batch_id)
        assert (found.succeeded_count, found.failed_count) == (2, 0)
        await batches.close()
        await redis.aclose()


def test_items_are_written_in_commands_that_are_not_too_long() -> None:
    from gateway.batch_store import _portions

    items: Iterable[bytes] = [b"x" * (400 << 10)] * 5
    portions = list(_portions(items))
    assert [sorted(portion) for portion in portions] == [["0", "1"], ["2", "3"], ["4"]]
