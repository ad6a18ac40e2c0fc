"""Batches in Redis: what is known of one, its items, its results in the order in which they came, and who works on it.

Keys of a batch: a hash of facts and counts, `:items` and `:results` (hashes by index), `:order` (a list of indices),
`:lease`. They name the tenant, so that nobody else finds the batch. Items and results are bytes that are not read here.
"""

import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, cast

import structlog
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import WatchError

from gateway.caller import current_caller
from gateway.records import BatchRecord
from shared.errors import BatchNotFound
from shared.hold import Hold
from shared.reach import reaching_store

log = structlog.get_logger()
_ABOUT, _SUCCEEDED, _FAILED, _CANCELLED = "about", "succeeded", "failed", "cancelled"
_FACTS = (_ABOUT, _SUCCEEDED, _FAILED, _CANCELLED)
_BATCH_ID = re.compile(r"[A-Za-z0-9_-]{32}")
_MAX_COMMAND_BYTES = 1 << 20  # larger ones make Redis stall for everybody


class BatchState(StrEnum):
    """How a batch stands."""

    RUNNING = "RUNNING"
    DONE = "DONE"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch without its items and results. `is_held`: a gateway is at work on it."""

    batch_id: str
    state: BatchState
    item_count: int
    succeeded_count: int
    failed_count: int
    create_time: datetime
    expire_time: datetime
    is_held: bool


class HeldBatch:
    """A batch that this process works on, until `release` or until the hold has not been renewed in time.

    Every method but `release` raises `StoreUnavailable`.
    """

    def __init__(self, redis: Redis, batch_id: str, record: BatchRecord, hold: Hold) -> None:
        self.batch_id = batch_id
        self.record = record
        self._redis = redis
        self._keys = _Keys(batch_id)
        self._hold = hold

    async def waiting(self) -> list[int]:
        """Return the indices of the items that have no result, in order."""
        with reaching_store():
            done = {int(index) for index in cast(list[bytes], await self._redis.hkeys(self._keys.results))}
        return [index for index in range(self.record.item_count) if index not in done]

    async def item(self, index: int) -> bytes:
        """Return an item; raise `BatchNotFound` where it has expired."""
        with reaching_store():
            value = cast(bytes | None, await self._redis.hget(self._keys.items, str(index)))
        if value is None:
            raise _not_found()
        return value

    async def add_result(self, index: int, result: bytes, *, is_failure: bool) -> bool:
        """Store the result of an item, once; False: it was not stored, because the hold was lost."""
        with reaching_store():
            if await self._redis.hexists(self._keys.results, str(index)):
                return True  # stored by an attempt whose answer was lost

        def queue(pipeline: Pipeline) -> None:
            pipeline.hset(self._keys.results, str(index), result)
            pipeline.rpush(self._keys.order, index)
            pipeline.hincrby(self._keys.facts, _FAILED if is_failure else _SUCCEEDED, 1)
            for key in self._keys.kept:
                pipeline.expire(key, self.record.ttl_s)

        return await self._hold.run(queue)

    async def renew(self) -> bool:
        """Hold the batch for the whole duration again, and keep it that long; False: the hold was lost."""

        def queue(pipeline: Pipeline) -> None:
            for key in self._keys.kept:
                pipeline.pexpire(key, self._hold.duration_ms, gt=True)

        return await self._hold.renew(queue)

    async def release(self) -> None:
        """Give the hold back. Never raises: what cannot be given back runs out."""
        await self._hold.release()


class BatchStore:
    """Batches of the current caller's tenant by id. Safe to share between tasks.

    Every method raises `StoreUnavailable`. What cannot be read back as a batch is logged and treated as one that does
    not exist.
    """

    def __init__(self, redis: Redis, lease_s: float) -> None:
        self._redis = redis
        self.lease_s = lease_s

    async def create(self, items: Sequence[bytes], concurrency: int, ttl_s: int, request_id: str) -> HeldBatch:
        """Write a batch down, held by the caller; it and its results outlive the last of them by `ttl_s`."""
        batch_id = secrets.token_urlsafe(24)
        record = BatchRecord(
            item_count=len(items),
            concurrency=concurrency,
            ttl_s=ttl_s,
            create_time=datetime.now(UTC),
            request_id=request_id,
        )
        keys = _Keys(batch_id)
        hold = Hold(self._redis, keys.lease, self.lease_s)
        with reaching_store():
            # The items go first: a batch must not name items that cannot be found.
            for mapping in _portions(items):
                async with self._redis.pipeline() as pipeline:
                    pipeline.hset(keys.items, mapping=mapping)
                    pipeline.expire(keys.items, ttl_s)  # with each: what is given up on the way has to go as well
                    await pipeline.execute()
            async with self._redis.pipeline() as pipeline:
                pipeline.hset(keys.facts, _ABOUT, record.model_dump_json())
                pipeline.expire(keys.facts, ttl_s)
                hold.queue_take(pipeline)
                await pipeline.execute()
        return HeldBatch(self._redis, batch_id, record, hold)

    async def get(self, batch_id: str) -> Batch:
        """Return the batch as it stands; raise `BatchNotFound`."""
        keys = _Keys(batch_id)
        with reaching_store():
            async with self._redis.pipeline() as pipeline:
                pipeline.hmget(keys.facts, _FACTS)
                pipeline.pttl(keys.facts)
                pipeline.exists(keys.lease)
                facts, left_ms, is_held = await pipeline.execute()
        return _understood(batch_id, facts, left_ms, is_held=bool(is_held))

    async def take(self, batch_id: str) -> HeldBatch | None:
        """Hold a batch that nobody holds; None: somebody does, or there is nothing left to do."""
        keys = _Keys(batch_id)
        hold = Hold(self._redis, keys.lease, self.lease_s)
        with reaching_store():
            async with self._redis.pipeline() as pipeline:
                hold.queue_take(pipeline)
                pipeline.hmget(keys.facts, _FACTS)
                is_taken, facts = await pipeline.execute()
        if not is_taken:
            return None
        # Read again with the hold taken: a batch may have been ended since the caller looked.
        if facts[0] is None or _understood(batch_id, facts, 0, is_held=True).state is not BatchState.RUNNING:
            await hold.release()
            return None
        return HeldBatch(self._redis, batch_id, _record(facts[0]), hold)

    async def cancel(self, batch_id: str) -> Batch:
        """End a batch that is running, whoever holds it; raise `BatchNotFound`."""
        keys = _Keys(batch_id)
        while (await self.get(batch_id)).state is BatchState.RUNNING:
            with reaching_store():
                async with self._redis.pipeline() as pipeline:
                    await pipeline.watch(keys.facts)
                    facts = cast(list[bytes | None], await pipeline.hmget(keys.facts, _FACTS))
                    if _understood(batch_id, facts, 0, is_held=True).state is not BatchState.RUNNING:
                        break
                    pipeline.multi()  # type: ignore[no-untyped-call]  # redis-py's own omission
                    pipeline.hset(keys.facts, _CANCELLED, "1")
                    pipeline.delete(keys.lease)  # without it no further result can be stored
                    try:
                        await pipeline.execute()
                    except WatchError:
                        continue  # a result came in between
        return await self.get(batch_id)

    async def results(self, batch_id: str, start: int, count: int) -> list[bytes]:
        """Return up to `count` results from the `start`-th on, in the order in which they came."""
        keys = _Keys(batch_id)
        with reaching_store():
            order = cast(list[bytes], await self._redis.lrange(keys.order, start, start + count - 1))
            if not order:
                return []
            values = cast(list[bytes | None], await self._redis.hmget(keys.results, [int(index) for index in order]))
        if None in values:
            raise _not_found()  # it expired in between
        return cast(list[bytes], values)


class _Keys:
    """The keys of a batch of the current caller's tenant; raises `BatchNotFound` for an id that cannot be one."""

    def __init__(self, batch_id: str) -> None:
        if not _BATCH_ID.fullmatch(batch_id):
            raise _not_found()
        # The braces keep the keys of a batch together in a cluster.
        self.facts = f"{current_caller().key_prefix}batch:{{{batch_id}}}"
        self.items, self.results = f"{self.facts}:items", f"{self.facts}:results"
        self.order, self.lease = f"{self.facts}:order", f"{self.facts}:lease"

    @property
    def kept(self) -> tuple[str, ...]:
        """What lives as long as the batch."""
        return (self.items, self.results, self.order, self.facts)


def _understood(batch_id: str, facts: Sequence[bytes | None], left_ms: int, *, is_held: bool) -> Batch:
    record, succeeded, failed = _record(facts[0]), int(facts[1] or 0), int(facts[2] or 0)
    if succeeded + failed >= record.item_count:
        state = BatchState.DONE
    else:
        state = BatchState.CANCELLED if facts[3] else BatchState.RUNNING
    expire_time = datetime.now(UTC) + timedelta(milliseconds=left_ms)
    return Batch(batch_id, state, record.item_count, succeeded, failed, record.create_time, expire_time, is_held)


def _record(value: bytes | None) -> BatchRecord:
    if value is None:
        raise _not_found()
    try:
        return BatchRecord.model_validate_json(value)
    except ValueError:
        log.error("stored_batch_rejected")
        raise _not_found() from None


def _portions(items: Iterable[bytes]) -> Iterator[dict[Any, Any]]:
    """Yield the items by index, in commands that are not too long."""
    portion: dict[Any, Any] = {}
    size = 0
    for index, item in enumerate(items):
        if portion and size + len(item) > _MAX_COMMAND_BYTES:
            yield portion
            portion, size = {}, 0
        portion[str(index)] = item
        size += len(item)
    yield portion


def _not_found() -> BatchNotFound:
    return BatchNotFound("There is no such batch, or it has expired.")
