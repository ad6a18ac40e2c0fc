"""Whatever a medium does to its worker, the service goes on, the next medium has one, and nothing is left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog

from shared.errors import DeadlineExceeded, MediaTooLarge, MediaUnreadable, ServiceError
from tests.media_pools import NEVER, SCRIPTED, SCRIPTED_TILING, SCRIPTED_WORKER, media_pool, picture_work, told
from vision_service.batcher import Deadline
from vision_service.workers.pool import MediaPool
from vision_service.workers.settings import WorkerSettings

ROOT = Path(__file__).parents[2]


def is_gone(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return True
    return False


async def error_of(at: MediaPool, order: bytes) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        await told(at, order)
    return caught.value


async def test_a_worker_serves_many_media_and_outlives_those_it_refuses() -> None:
    async with media_pool(command=SCRIPTED, max_media=10) as at:
        first = await told(at)
        assert (await error_of(at, b"refuse")).message == "No."
        assert await told(at) == first
        seen = {await told(at) for _ in range(10)}
        assert len(seen) == 2  # it was replaced once, because decoders leak


async def test_a_crash_is_the_mediums_fault_and_the_next_medium_has_a_new_worker() -> None:
    async with media_pool(command=SCRIPTED) as at:
        first = await told(at)
        assert type(await error_of(at, b"crash")) is MediaUnreadable
        assert await told(at) != first


async def test_a_worker_that_the_kernel_ends_for_want_of_memory_had_too_large_a_medium() -> None:
    async with media_pool(command=SCRIPTED) as at:
        assert type(await error_of(at, b"out of memory")) is MediaTooLarge
        assert await told(at)


async def test_a_worker_that_hangs_is_ended() -> None:
    async with media_pool(command=SCRIPTED, timeout_s=1.0) as at:
        first = await told(at)
        error = await error_of(at, b"hang")
        assert type(error) is MediaTooLarge
        assert "1 seconds" in error.message
        assert is_gone(first)


@pytest.mark.parametrize("order", [b"end", b"babble", b"nest", b"invent", b"forget", b"exaggerate"])
async def test_a_worker_that_fails_by_itself_or_lies_is_replaced(order: bytes) -> None:
    async with media_pool(command=SCRIPTED) as at:
        first = await told(at)
        with pytest.raises(RuntimeError, match="media worker"):
            await told(at, order)
        assert await told(at) != first


async def test_workers_are_there_before_the_first_medium_and_a_replacement_before_the_next() -> None:
    async with media_pool(command=SCRIPTED, processes=2) as at:
        await at.start()
        before = {worker._process.pid for worker in at._workers}
        assert len(before) == 2
        assert await told(at) in before
        await error_of(at, b"crash")
        assert len({worker._process.pid for worker in at._workers} - before) == 1  # while nobody asks for it


async def test_a_worker_that_cannot_start_is_a_fault_of_ours_and_is_not_tried_again_for_nobody(tmp_path: Path) -> None:
    script = f"import pathlib, os; pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch(); raise SystemExit(3)"
    async with media_pool(command=(sys.executable, "-c", script)) as at:
        with pytest.raises(RuntimeError, match="did not start"):
            await at.start()
        assert len(list(tmp_path.iterdir())) == 1
        with pytest.raises(RuntimeError, match="did not start"):
            await told(at)
        assert len(list(tmp_path.iterdir())) == 2


async def test_a_worker_that_hangs_while_it_starts_is_ended_and_replaced(tmp_path: Path) -> None:
    first_hangs = f"""
import os, pathlib, time
started = pathlib.Path({str(tmp_path / "started")!r})
if not started.exists():
    started.write_text(str(os.getpid()))
    time.sleep(1000)
"""
    command = (sys.executable, "-c", first_hangs + SCRIPTED_WORKER)
    async with media_pool(command=command, start_timeout_s=1.0) as at:
        with pytest.raises(RuntimeError, match="did not start"):
            await told(at)
    (tmp_path / "started").touch()
    async with media_pool(command=command) as at:
        assert await told(at)


async def test_closing_ends_a_worker_that_is_being_started(tmp_path: Path) -> None:
    script = f"import os, pathlib, time; pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch(); time.sleep(1000)"
    async with media_pool(command=(sys.executable, "-c", script), processes=3) as at:
        calls = [asyncio.create_task(told(at)) for _ in range(3)]
        while not any(tmp_path.iterdir()):  # one is up, the others may be anywhere on their way
            await asyncio.sleep(0.001)
        at.close()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, RuntimeError | asyncio.CancelledError) for outcome in outcomes), outcomes
    assert all(is_gone(int(worker.name)) for worker in tmp_path.iterdir())


async def test_a_pool_that_was_closed_while_a_process_was_made_ends_that_process(tmp_path: Path) -> None:
    # The pool looks at its command when it makes a process: this one lets the pool be closed at that moment.
    script = f"import os, pathlib, time; pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch(); time.sleep(1000)"
    making, closed = threading.Event(), threading.Event()

    class Command(Sequence[str]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: Any) -> Any:
            making.set()
            assert closed.wait(60)
            return (sys.executable, "-c", script)[index]

    at = MediaPool(WorkerSettings(picture_work(), 60, 4 << 30, 100), 1, Command())
    call = asyncio.create_task(told(at))
    await asyncio.to_thread(making.wait)
    at.close()
    closed.set()
    with pytest.raises(RuntimeError, match="closed"):
        await call
    assert all(is_gone(int(worker.name)) for worker in tmp_path.iterdir())


async def test_closing_ends_the_workers_whatever_they_do() -> None:
    async with media_pool(command=SCRIPTED) as at:
        worker = await told(at)
        call = asyncio.create_task(told(at, b"hang"))
        await asyncio.sleep(0)
        at.close()
        with pytest.raises((RuntimeError, asyncio.CancelledError)):
            await call
        assert is_gone(worker)


async def test_a_medium_that_nobody_waits_for_any_more_is_not_decoded() -> None:
    async with media_pool(command=("/nowhere",)) as at:
        with pytest.raises(DeadlineExceeded):
            await at.prepare(b"", SCRIPTED_TILING, None, Deadline(0.0))


async def test_a_deadline_ends_the_wait_for_a_worker_and_an_extended_one_keeps_its_place() -> None:
    async with media_pool(command=SCRIPTED) as at:
        await at.start()
        hanging = asyncio.create_task(told(at, b"hang"))
        await asyncio.sleep(0)  # it has the only worker
        with pytest.raises(DeadlineExceeded):
            await at.prepare(b"tell", SCRIPTED_TILING, None, Deadline(0.05))
        assert not hanging.done()
        deadline = Deadline(0.05)
        waiting = asyncio.create_task(at.prepare(b"tell", SCRIPTED_TILING, None, deadline))
        deadline.extend(None)
        (worker,) = at._workers
        os.kill(worker._process.pid, signal.SIGSEGV)
        with pytest.raises(MediaUnreadable):
            await hanging
        assert (await waiting).width


async def test_a_call_that_is_cancelled_while_it_waits_takes_nobodys_turn() -> None:
    async with media_pool(command=SCRIPTED) as at:
        calls = [asyncio.create_task(told(at)) for _ in range(5)]
        await asyncio.sleep(0)
        for call in calls[:4]:
            call.cancel()
        assert await calls[4]
        assert await told(at)


async def test_media_are_decoded_side_by_side() -> None:
    async with media_pool(command=SCRIPTED, processes=2) as at:
        hanging = asyncio.create_task(told(at, b"hang"))
        await asyncio.sleep(0)
        assert await told(at)
        hanging.cancel()


async def test_workers_know_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISION_EMBEDDING_KEY", "secret")
    script = SCRIPTED_WORKER.replace('os.getpid(), "height"', "1 + ('VISION_EMBEDDING_KEY' in os.environ), \"height\"")
    async with media_pool(command=(sys.executable, "-c", script)) as at:
        assert await told(at) == 1


async def test_workers_that_cannot_be_confined_are_warned_of_once() -> None:
    script = SCRIPTED_WORKER.replace('"locked": True', '"locked": False')
    async with media_pool(command=(sys.executable, "-c", script)) as at:
        with structlog.testing.capture_logs() as logs:
            await told(at)
            await error_of(at, b"crash")
            await told(at)
    assert [entry["event"] for entry in logs].count("media_workers_not_confined") == 1


# A service that has one worker at work and one that waits, and says their process ids.
SERVICE = """
import asyncio
from tests.media_pools import TIED, media_pool, told

async def main():
    async with media_pool(command=TIED, processes=2) as at:
        await at.start()
        busy = asyncio.create_task(told(at, b"hang"))
        await told(at)
        print(*(worker._process.pid for worker in at._workers), flush=True)
        await busy

asyncio.run(main())
"""


def test_workers_end_with_a_service_that_is_killed() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", SERVICE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as service:
        assert service.stdout is not None
        workers = [int(word) for word in service.stdout.readline().split()]
        assert len(workers) == 2
        service.kill()
    for worker in workers:
        while not is_gone(worker) and state_of(worker) != "Z":  # whoever adopts it may not have looked after it yet
            os.sched_yield()


def state_of(process_id: int) -> str:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "Z"


async def test_closing_twice_is_closing_once() -> None:
    async with media_pool(command=SCRIPTED) as at:
        await told(at)
        at.close()


async def test_what_is_closed_decodes_nothing() -> None:
    async with media_pool(command=SCRIPTED) as at:
        at.close()
        with pytest.raises(RuntimeError):
            await at.prepare(b"tell", SCRIPTED_TILING, None, NEVER)
