"""Batches of independent questions: each takes the path of a chat, and what becomes of it waits in the store.

A batch goes on without its caller. It is held by one gateway at a time; when that one dies its hold runs out, and the
next gateway that is asked about the batch takes it over and asks the items that have no result.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Protocol, TypeVar
from weakref import WeakValueDictionary

import structlog

from gateway.batch_store import Batch, BatchState, BatchStore, HeldBatch
from gateway.caller import current_caller
from gateway.conversations import MAX_TTL_S
from gateway.events import ChatEvent, ChatRequest, Delta, Finished, Started
from gateway.media import MediaLibrary
from shared.digest import digest_of
from shared.errors import InternalError, InvalidRequest, QueueFull, ServiceError, StoreUnavailable, Unavailable
from shared.rpc.deadline import adopt, detached, request_id

log = structlog.get_logger()
T = TypeVar("T")
_PAGE_SIZE = 16
# Overload and absence pass; a batch has time, so its items wait for that, a little longer each time.
PATIENCE_S = (1.0, 2.0, 4.0, 8.0, 16.0)
# How long a gateway leaves a batch alone that it could not go on with: what failed would fail again.
REST_S = 30.0
_MAX_REQUEST_ID_CHARS = 128


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What batches may ask for: items and their bytes each, a tenant's items at a time, and batches in a gateway.

    How many items of all tenants run at once is for what answers them to say.
    """

    items: int = 1000
    item_bytes: int = 4 << 20
    concurrency: int = 8
    running: int = 64
    ttl_s: int = 86_400


@dataclass(frozen=True, slots=True)
class NewBatch:
    """What is to be asked. `items` name their media by digest; `contents` are the bytes of those that came along."""

    items: tuple[bytes, ...]
    contents: Mapping[str, bytes]
    named: frozenset[str] = frozenset()
    concurrency: int = 0
    ttl_s: int | None = None


@dataclass(frozen=True, slots=True)
class ItemAnswer:
    """A whole answer: its beginning, what each candidate said in order, and its end."""

    started: Started
    deltas: tuple[Delta, ...]
    finished: Finished


class Answering(Protocol):
    """What answers chats."""

    def answer(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        """Stream one answer, ending with `Finished`."""


class ItemFormat(Protocol):
    """How items and results are written as bytes."""

    def read_item(self, value: bytes) -> ChatRequest:
        """Return the question; raise `InvalidRequest` for one that is malformed."""

    def write_result(self, index: int, outcome: ItemAnswer | ServiceError) -> bytes:
        """Return what became of an item."""


class Batches:
    """The batches of this process. One event loop only."""

    def __init__(
        self,
        chat: Answering,
        library: MediaLibrary,
        store: BatchStore,
        item_format: ItemFormat,
        limits: BatchLimits,
        poll_s: float = 0.5,
        patience_s: Sequence[float] = PATIENCE_S,
        rest_s: float = REST_S,
    ) -> None:
        self._chat = chat
        self._library = library
        self._store = store
        self._format = item_format
        self._limits = limits
        self._poll_s = poll_s
        self._patience_s = patience_s
        self._rest_s = rest_s
        # One for each tenant that has a batch: its items may wait for its budget, and then hold up no other's.
        self._rooms = WeakValueDictionary[str, asyncio.Semaphore]()
        self._running: dict[str, _Run] = {}
        self._places_promised = 0  # to batches that are being written down or taken over
        self._resting: dict[str, float] = {}  # until when batches are left alone, in the loop's time
        self._tasks: set[asyncio.Task[None]] = set()

    async def create(self, new: NewBatch) -> Batch:
        """Begin a batch. Raises `InvalidRequest`, `QueueFull`, `StoreUnavailable`."""
        self._check(new)
        ttl_s = new.ttl_s or self._limits.ttl_s
        concurrency = min(new.concurrency or self._limits.concurrency, self._limits.concurrency)
        with self._place():
            await self._library.store(new.contents, new.named, ttl_s)
            held = await self._store.create(new.items, concurrency, ttl_s, request_id())
            self._start(held)
        log.info("batch_created", batch=_log_name(held.batch_id), items=len(new.items), concurrency=concurrency)
        return await self._store.get(held.batch_id)

    async def get(self, batch_id: str) -> Batch:
        """Return the batch, taken over if nobody works on it; raise `BatchNotFound`, `StoreUnavailable`."""
        batch = await self._store.get(batch_id)
        if batch.state is BatchState.RUNNING and not batch.is_held and self._may_take_over(batch_id):
            with self._place():
                if held := await self._store.take(batch_id):
                    log.info("batch_taken_over", batch=_log_name(batch_id))
                    self._start(held)
        return batch

    async def cancel(self, batch_id: str) -> Batch:
        """End the batch early; raise `BatchNotFound`, `StoreUnavailable`."""
        batch = await self._store.cancel(batch_id)
        if run := self._running.get(batch_id):
            run.stopped.set()
        return batch

    async def results(self, batch_id: str) -> AsyncGenerator[bytes, None]:
        """Stream the results in the order in which they come, until there will be no more."""
        sent = 0
        while True:
            run = self._running.get(batch_id)
            news = run.news if run else asyncio.Event()
            batch = await self.get(batch_id)
            page = await self._store.results(batch_id, sent, _PAGE_SIZE)
            for result in page:
                yield result
            sent += len(page)
            if page:
                continue
            if batch.state is not BatchState.RUNNING:
                return
            # Not `wait_for`, which can forget that the reader has gone (before Python 3.12).
            with suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s):
                    await news.wait()

    async def close(self) -> None:
        """Stop work and give the batches back, so that another gateway goes on as soon as one is asked."""
        for run in self._running.values():
            run.stopped.set()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _check(self, new: NewBatch) -> None:
        limits = self._limits
        if not 1 <= len(new.items) <= limits.items:
            raise InvalidRequest(f"A batch has 1 to {limits.items} items.", field="items")
        if sum(map(len, new.items)) > limits.item_bytes:
            raise InvalidRequest(
                f"The items of a batch have at most {limits.item_bytes} bytes, media apart.", field="items"
            )
        if new.concurrency < 0:
            raise InvalidRequest("A batch asks at least one item at a time.", field="concurrency")
        if new.ttl_s is not None and not 1 <= new.ttl_s <= MAX_TTL_S:
            raise InvalidRequest("A batch is kept for 1 second to 30 days.", field="ttl")

    def _may_take_over(self, batch_id: str) -> bool:
        is_resting = self._resting.get(batch_id, 0.0) > asyncio.get_running_loop().time()
        return batch_id not in self._running and not is_resting and self._has_place

    @property
    def _has_place(self) -> bool:
        return len(self._running) + self._places_promised < self._limits.running

    @contextmanager
    def _place(self) -> Iterator[None]:
        """Keep a place for a batch until it has begun, or has not; raise `QueueFull` where there is none."""
        if not self._has_place:
            raise QueueFull("This gateway works on as many batches as it can; try again later.", retry_after_s=5.0)
        self._places_promised += 1
        try:
            yield
        finally:
            self._places_promised -= 1

    def _start(self, held: HeldBatch) -> None:
        run = self._running[held.batch_id] = _Run()
        # The caller's deadline ends its call, not the batch. The batch is worked on as its tenant, who alone can have
        # begun it or asked about it: the call's context says who that is.
        self._note(asyncio.get_running_loop().create_task(self._run(held, run), context=detached()))

    def _note(self, task: asyncio.Task[None]) -> asyncio.Task[None]:
        """Have `close` wait for the task."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run(self, held: HeldBatch, run: "_Run") -> None:
        """Ask the items that have no result until all have one, the hold is lost, or the run is stopped."""
        parts = (self._work(held), self._renew(held), _until(run.stopped))
        tasks = [asyncio.create_task(part) for part in parts]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # First of all, and without a pause: whatever happens to this task, its place is free again.
            self._running.pop(held.batch_id).announce()
            # Shielded: a process that is told twice to stop must not leave the batch to wait for its hold.
            await asyncio.shield(self._note(asyncio.create_task(self._leave(held, tasks))))

    async def _leave(self, held: HeldBatch, tasks: Sequence[asyncio.Task[None]]) -> None:
        """End the tasks and give the batch back."""
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                log.error("batch_failed", batch=_log_name(held.batch_id), exc_info=ended)
                self._rest(held)
        await held.release()

    def _rest(self, held: HeldBatch) -> None:
        """Leave the batch alone for a while."""
        now = asyncio.get_running_loop().time()
        self._resting = {batch_id: until for batch_id, until in self._resting.items() if until > now}
        self._resting[held.batch_id] = now + self._rest_s

    async def _work(self, held: HeldBatch) -> None:
        try:
            room = self._rooms.setdefault(current_caller().tenant, asyncio.Semaphore(self._limits.concurrency))
            waiting = iter(await self._reaching(held.waiting))
            async with asyncio.TaskGroup() as group:
                for _ in range(held.record.concurrency):
                    group.create_task(self._worker(held, waiting, room))
        except* _HoldLost:
            log.info("batch_hold_lost", batch=_log_name(held.batch_id))
        except* ServiceError as errors:
            reasons = sorted({error.reason for error in errors.exceptions if isinstance(error, ServiceError)})
            log.warning("batch_left", batch=_log_name(held.batch_id), reasons=reasons)
            self._rest(held)
        else:
            log.info("batch_finished", batch=_log_name(held.batch_id), items=held.record.item_count)

    async def _worker(self, held: HeldBatch, waiting: Iterator[int], room: asyncio.Semaphore) -> None:
        for index in waiting:
            async with room:
                await self._settle(held, index)

    async def _settle(self, held: HeldBatch, index: int) -> None:
        """Ask one item and store what became of it."""
        adopt(None, item_request_id(held.record.request_id, index))
        item = await self._reaching(lambda: held.item(index))
        outcome = await self._outcome(item)
        result = self._format.write_result(index, outcome)
        if not await self._stored(held, index, result, is_failure=isinstance(outcome, ServiceError)):
            raise _HoldLost("The hold was lost.")
        if run := self._running.get(held.batch_id):
            run.announce()

    async def _stored(self, held: HeldBatch, index: int, result: bytes, *, is_failure: bool) -> bool:
        """Store a result, however long the store refuses it; False: the hold was lost.

        An answer is dear, and whoever took the batch over would have to ask again. A hold that is lost ends the wait.
        """
        waits_s = chain(self._patience_s, repeat(self._patience_s[-1]))
        while True:
            try:
                return await held.add_result(index, result, is_failure=is_failure)
            except StoreUnavailable:
                await asyncio.sleep(next(waits_s))

    async def _outcome(self, item: bytes) -> ItemAnswer | ServiceError:
        try:
            request = replace(self._format.read_item(item), in_background=True)
            return await self._patiently(lambda: self._answered(request))
        except ServiceError as error:
            log.info("batch_item_failed", reason=error.reason)
            return error
        except Exception:  # no call's interceptor stands around an item
            log.exception("batch_item_failed")
            return InternalError("The server failed; its log has the request id.")

    async def _answered(self, request: ChatRequest) -> ItemAnswer:
        started: Started | None = None
        deltas: list[Delta] = []
        finished: Finished | None = None
        async with aclosing(self._chat.answer(request)) as events:
            async for event in events:
                match event:
                    case Started():
                        started = event
                    case Delta():
                        deltas.append(event)
                    case Finished():
                        finished = event
        assert started is not None
        assert finished is not None
        return ItemAnswer(started, tuple(deltas), finished)

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask until it is neither too busy nor away, a few times."""
        for wait_s in self._patience_s:
            try:
                return await ask()
            except (QueueFull, Unavailable) as error:
                log.info("batch_item_waits", reason=error.reason, wait_s=wait_s)
                await asyncio.sleep(max(wait_s, error.retry_after_s or 0))
        return await ask()

    async def _reaching(self, use: Callable[[], Awaitable[T]]) -> T:
        """Use the store, a few times where it cannot be reached."""
        for wait_s in self._patience_s:
            try:
                return await use()
            except StoreUnavailable:
                await asyncio.sleep(wait_s)
        return await use()

    async def _renew(self, held: HeldBatch) -> None:
        is_held = True
        while is_held:
            await asyncio.sleep(self._store.lease_s / 3)
            try:
                is_held = await held.renew()
            except StoreUnavailable:
                continue  # logged; the hold may outlive the fault
        log.info("batch_hold_lost", batch=_log_name(held.batch_id))


def item_request_id(request_id: str, index: int) -> str:
    """Return the request id of an item: the batch's, cut where it would become too long, and the item's index."""
    ending = f".{index}"
    return f"{request_id[: _MAX_REQUEST_ID_CHARS - len(ending)]}{ending}"


class _Run:
    """A batch at work until `stopped` is set. `news` is set when there is another result, and then is another event."""

    def __init__(self) -> None:
        self.stopped = asyncio.Event()
        self.news = asyncio.Event()

    def announce(self) -> None:
        news, self.news = self.news, asyncio.Event()
        news.set()


class _HoldLost(Exception):
    """Somebody else has the batch, or it was ended."""


async def _until(event: asyncio.Event) -> None:
    await event.wait()


def _log_name(batch_id: str) -> str:
    """Return what finds a batch in the log; whoever knows its id could read its results."""
    return digest_of(batch_id.encode())[:12]
