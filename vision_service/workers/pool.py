"""Has media decoded by worker processes: a few at a time, each within its time, none able to harm the service."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TypeVar

import structlog

from shared.errors import DeadlineExceeded
from vision_service.batcher import Deadline
from vision_service.preprocess.estimate import Estimate
from vision_service.preprocess.frames import VideoSpec
from vision_service.preprocess.image import Picture
from vision_service.preprocess.tiling import TilingSpec
from vision_service.runner import WorkerPool
from vision_service.workers.channel import Header
from vision_service.workers.process import WORKER, WorkerProcess
from vision_service.workers.settings import WorkerSettings
from vision_service.workers.task import Estimation, Preparation, Task, estimate_of, header_of_task, picture_of

T = TypeVar("T")
log = structlog.get_logger()


class MediaPool:
    """Decodes media of one kind in up to `processes` processes, each made by `command`. One event loop only.

    Processes are made by `start`, else when they are needed. One that ends is replaced at once, so that no medium waits
    for it; but one that never started is not, until a medium needs it.
    """

    def __init__(self, settings: WorkerSettings, processes: int, command: Sequence[str] = WORKER) -> None:
        self._settings = settings
        self._processes = processes
        self._command = command
        self._turns = asyncio.Semaphore(processes)
        self._threads = WorkerPool(processes, settings.work.kind)
        self._idle: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of the three below: what is closed gets no worker any more
        self._workers: set[WorkerProcess] = set()
        self._closed = False
        self._warned = False

    async def start(self) -> None:
        """Return once all processes take media; raises `RuntimeError` where one never will."""
        await asyncio.gather(*(self._threads.run(self._start) for _ in range(self._processes)))

    async def prepare(self, content: bytes, tiling: TilingSpec, video: VideoSpec | None, deadline: Deadline) -> Picture:
        """Return the tiles of a picture, or of the frames of a video that are seen.

        Raises `MediaUnreadable`, also where the decoder crashes, `MediaTooLarge`, also where it takes too much time or
        memory, `VideoRangeEmpty`, and `DeadlineExceeded` where the deadline passes before the medium's turn.
        """
        return await self._ask(Preparation(tiling, video), content, partial(picture_of, tiling=tiling), deadline)

    async def estimate(self, head: bytes, tiling: TilingSpec, tokens_per_tile: int, deadline: Deadline) -> Estimate:
        """Return what a picture will take, by its first bytes; raises what `prepare` raises."""
        task = Estimation(tiling, tokens_per_tile)
        return await self._ask(task, head, lambda header, _: estimate_of(header), deadline)

    def close(self) -> None:
        """End the processes, whatever they are doing; one that is only being made ends as soon as it is there."""
        self._threads.close()
        with self._lock:
            self._closed = True
            workers = list(self._workers)
        for worker in workers:
            worker.kill()
        with suppress(queue.Empty):
            while True:
                self._forget(self._idle.get_nowait())

    async def _ask(self, task: Task, content: bytes, read: Callable[[Header, memoryview], T], deadline: Deadline) -> T:
        async with self._turn(deadline):
            return await self._threads.run(self._answer, header_of_task(task), content, read)

    @asynccontextmanager
    async def _turn(self, deadline: Deadline) -> AsyncIterator[None]:
        """Wait for a process to be free, in order of arrival and as long as anybody waits for the medium."""
        turn = asyncio.ensure_future(self._turns.acquire())
        try:
            while not turn.done() and not deadline.passed:
                await asyncio.wait([turn], timeout=deadline.remaining_s)
            if deadline.passed:
                raise DeadlineExceeded("The deadline passed while the medium waited to be decoded.")
            yield
        finally:
            if not turn.cancel():
                self._turns.release()

    # Below: on the threads, of which there are as many as processes.

    def _start(self) -> None:
        worker = self._new_worker()
        try:
            self._await_start(worker)
        finally:
            self._give_back(worker)

    def _answer(self, request: Header, content: bytes, read: Callable[[Header, memoryview], T]) -> T:
        worker = self._take()
        try:
            self._await_start(worker)
            return worker.ask(request, content, read)
        finally:
            self._give_back(worker)

    def _take(self) -> WorkerProcess:
        with suppress(queue.Empty):
            while True:
                worker = self._idle.get_nowait()
                if worker.reusable:
                    return worker
                self._forget(worker)
        return self._new_worker()

    def _give_back(self, worker: WorkerProcess) -> None:
        if not worker.reusable:
            self._forget(worker)
            if not worker.started or self._closed:
                return
            worker = self._new_worker()
        self._idle.put(worker)

    def _new_worker(self) -> WorkerProcess:
        worker = WorkerProcess(self._settings, self._command)
        with self._lock:
            if not self._closed:
                self._workers.add(worker)
                return worker
        worker.end()
        raise RuntimeError("the media workers have been closed")

    def _forget(self, worker: WorkerProcess) -> None:
        with self._lock:
            self._workers.discard(worker)
        worker.end()

    def _await_start(self, worker: WorkerProcess) -> None:
        worker.await_start()
        if not worker.locked and not self._warned:
            self._warned = True
            log.warning("media_workers_not_confined", kind=self._settings.work.kind)
