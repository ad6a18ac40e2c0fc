"""What is put waits in a bounded queue: nobody waits for it, and what does not fit or is erased is not written."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shared.embedding import Embedding
from shared.stored_name import tenant_tag_of
from shared.write_queue import DEFAULT_LIMITS, QueueLimits, WriteQueue
from tests.shared.stored import Recorder, embedding, key_of


class Sink:
    """Where a queue writes to; a closed `gate` holds writes up."""

    def __init__(self) -> None:
        self.held: list[Embedding] = []
        self.begun = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def write(self, written: Embedding) -> bool:
        self.begun.set()
        await self.gate.wait()
        self.held.append(written)
        return True

    async def take_back(self, written: Embedding) -> None:
        self.held.remove(written)


def small(index: int, tenant: str = "acme") -> Embedding:
    return embedding(tiles=1, hidden=8, key=key_of(index, media=index, tenant=tenant), tokens_per_tile=4)


@asynccontextmanager
async def running(sink: Sink, seen: Recorder, limits: QueueLimits = DEFAULT_LIMITS) -> AsyncIterator[WriteQueue]:
    queue = WriteQueue(sink.write, sink.take_back, limits, seen)
    task = asyncio.create_task(queue.run())
    try:
        yield queue
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_what_is_put_is_written_in_order_and_told() -> None:
    sink, seen = Sink(), Recorder()
    async with running(sink, seen) as queue:
        assert all(await asyncio.gather(*(queue.put(small(index)) for index in range(5))))
    assert sink.held == [small(index) for index in range(5)]
    assert seen.queued[-1] == (0, 0)
    assert not seen.dropped


async def test_putting_never_waits_and_what_does_not_fit_is_dropped() -> None:
    sink, seen = Sink(), Recorder()
    sink.gate.clear()
    size = small(0).info.size_bytes
    async with running(sink, seen, QueueLimits(items=3, size_bytes=10**6)) as queue:
        by_count = [queue.put(small(index)) for index in range(5)]
        assert [future.done() for future in by_count] == [False, False, False, True, True]
        assert not by_count[4].result()
        assert seen.dropped == ["queue_full"] * 2
        sink.gate.set()
        assert all(await asyncio.gather(*by_count[:3]))
        assert await queue.put(small(4)), "there is room again"
    async with running(sink, seen, QueueLimits(items=100, size_bytes=2 * size)) as queue:
        by_bytes = [queue.put(small(index)) for index in range(3)]
        assert [future.done() for future in by_bytes] == [False, False, True]


async def test_the_same_embedding_is_queued_once_and_one_who_gives_up_takes_it_from_nobody() -> None:
    sink, seen = Sink(), Recorder()
    sink.gate.clear()
    async with running(sink, seen) as queue:
        first, second = queue.put(small(1)), queue.put(small(1))
        assert len(queue) == 1
        first.cancel()
        sink.gate.set()
        assert await second
    assert sink.held == [small(1)]


async def test_what_is_erased_while_it_waits_is_not_written() -> None:
    sink, seen = Sink(), Recorder()
    sink.gate.clear()
    async with running(sink, seen) as queue:
        writes = [queue.put(small(index)) for index in range(3)] + [queue.put(small(3, "other"))]
        queue.erase_tagged(tenant_tag_of("acme"), small(1).key.media_digest)
        sink.gate.set()
        assert await asyncio.gather(*writes) == [True, False, True, True]
        sink.gate.clear()
        late = queue.put(small(7)), queue.put(small(8, "other"))
        queue.erase_tagged(tenant_tag_of("acme"), None)
        sink.gate.set()
        assert await asyncio.gather(*late) == [False, True]
    assert small(1) not in sink.held


async def test_what_is_erased_while_it_is_being_written_is_taken_back() -> None:
    sink, seen = Sink(), Recorder()
    sink.gate.clear()
    async with running(sink, seen) as queue:
        write = queue.put(small(1))
        await sink.begun.wait()
        queue.clear()
        sink.gate.set()
        assert not await write
        assert sink.held == []


async def test_draining_waits_for_what_is_queued_and_no_longer_than_it_may() -> None:
    sink, seen = Sink(), Recorder()
    async with running(sink, seen) as queue:
        for index in range(3):
            queue.put(small(index))
        await queue.drain(60)
        assert len(sink.held) == 3
        sink.gate.clear()
        queue.put(small(9))
        await queue.drain(0.01)
        assert len(queue) == 1


async def test_what_is_left_at_the_end_is_told_to_be_lost() -> None:
    sink, seen = Sink(), Recorder()
    sink.gate.clear()
    async with running(sink, seen) as queue:
        writes = [queue.put(small(index)) for index in range(3)]
        await sink.begun.wait()
    assert [write.result() for write in writes] == [False] * 3
    assert seen.dropped == ["closing"] * 2
    assert seen.queued[-1] == (0, 0)


async def test_what_waits_can_be_had_and_what_was_erased_cannot() -> None:
    sink = Sink()
    sink.gate.clear()
    async with running(sink, Recorder()) as queue:
        writing, erased = small(0), small(1, tenant="gone")
        futures = [queue.put(writing), queue.put(erased)]
        await sink.begun.wait()
        assert queue.get(writing.key) is writing
        assert queue.get(erased.key) is erased
        queue.erase_tagged(tenant_tag_of("gone"), None)
        assert queue.get(erased.key) is None
        sink.gate.set()
        assert await asyncio.gather(*futures) == [True, False]
        assert queue.get(writing.key) is None
