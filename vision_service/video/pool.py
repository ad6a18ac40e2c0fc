"""Has videos decoded by worker processes: a few at a time, each within its time, none able to harm the service."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import BinaryIO, Final, cast

import numpy as np
import structlog

from shared.embedding import VideoFrame
from shared.errors import DeadlineExceeded, MediaTooLarge, MediaUnreadable, ServiceError, VideoRangeEmpty
from vision_service.batcher import Deadline
from vision_service.preprocess.frames import DecoderName, VideoSpec
from vision_service.preprocess.image import Picture
from vision_service.preprocess.tiling import Grid, TilingSpec
from vision_service.runner import WorkerPool
from vision_service.video.messages import Header, read_message, write_message
from vision_service.video.source import VideoLimits

log = structlog.get_logger()
WORKER: Final = (sys.executable, "-m", "vision_service.video.worker")
_MAX_VIDEOS: Final = 100  # of one process, because decoders leak
_REFUSALS: Final[dict[str, type[ServiceError]]] = {
    error.reason: error for error in (MediaUnreadable, MediaTooLarge, VideoRangeEmpty)
}


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker process does and may do.

    Decoder, limits of videos, seconds per video, bytes of address space, and seconds from its start to its first video.
    """

    decoder: DecoderName
    limits: VideoLimits
    timeout_s: float
    memory_bytes: int
    start_timeout_s: float = 60.0


class VideoPool:
    """Decodes videos in up to `processes` processes, started by `command` when they are needed. One event loop only."""

    def __init__(self, settings: WorkerSettings, processes: int, command: Sequence[str] = WORKER) -> None:
        self._settings = settings
        self._command = command
        self._threads = WorkerPool(processes, "video")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of the two below: what is closed gets no worker any more
        self._workers: set[_Worker] = set()
        self._closed = False

    async def prepare(self, content: bytes, video: VideoSpec, tiling: TilingSpec, deadline: Deadline) -> Picture:
        """Return the tiles of the frames that are seen.

        Raises `MediaUnreadable`, also where the decoder crashes, `MediaTooLarge`, also where it takes too much time or
        memory, `VideoRangeEmpty`, and `DeadlineExceeded` where the deadline passes before the video's turn.
        """
        assert video.decoder == self._settings.decoder
        return await self._threads.run(self._prepare, content, video, tiling, deadline)

    def close(self) -> None:
        """End the processes, whatever they are doing; one that is only being made ends as soon as it is there."""
        self._threads.close()
        with self._lock:
            self._closed = True
            workers = list(self._workers)
        for worker in workers:
            worker.end()

    # Below: on the threads, of which there are as many as processes.

    def _prepare(self, content: bytes, video: VideoSpec, tiling: TilingSpec, deadline: Deadline) -> Picture:
        if deadline.passed:
            raise DeadlineExceeded("The deadline passed while the video waited to be decoded.")
        worker = self._worker()
        try:
            return worker.prepare(content, video, tiling)
        finally:
            if worker.reusable and not self._closed:
                self._idle.put(worker)
            else:
                self._forget(worker)

    def _worker(self) -> "_Worker":
        with suppress(queue.Empty):
            while True:
                worker = self._idle.get_nowait()
                if worker.reusable:
                    return worker
                self._forget(worker)
        worker = _Worker(self._settings, self._command)
        with self._lock:
            if not self._closed:
                self._workers.add(worker)
                return worker
        worker.end()
        raise RuntimeError("the video workers have been closed")

    def _forget(self, worker: "_Worker") -> None:
        with self._lock:
            self._workers.discard(worker)
        worker.end()


class _Worker:
    """One process and the pipes to it. Used by one thread at a time, but `end` may be called from any."""

    def __init__(self, settings: WorkerSettings, command: Sequence[str]) -> None:
        self._settings = settings
        self._videos = 0
        self._late = False
        self._broken = False
        self._process = subprocess.Popen(  # noqa: S603  # our own module, with settings of ours
            [*command, json.dumps(asdict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,
        )
        self._input = cast(BinaryIO, self._process.stdin)
        self._output = cast(BinaryIO, self._process.stdout)
        self._started = False

    @property
    def reusable(self) -> bool:
        """Whether the process can take another video."""
        return not self._broken and self._videos < _MAX_VIDEOS and self._process.poll() is None

    def prepare(self, content: bytes, video: VideoSpec, tiling: TilingSpec) -> Picture:
        """Return what the process makes of a video; raises as `VideoPool.prepare` does."""
        self._await_start()
        self._videos += 1
        try:
            with self._limited(self._settings.timeout_s):
                write_message(self._input, {"video": asdict(video), "tiling": asdict(tiling)}, content)
                header, tiles = read_message(self._output)
        except (OSError, EOFError, ValueError) as error:
            self._broken = True
            raise self._death() from error
        if "reason" in header:
            raise _REFUSALS[header["reason"]](header["message"])
        return _picture_of(header, tiles, tiling, self._settings.limits)

    def end(self) -> None:
        """End the process and forget it; calls that wait for it fail."""
        self._broken = True
        self._process.kill()
        self._process.wait()
        for pipe in (self._input, self._output):
            with suppress(OSError, ValueError):
                pipe.close()

    def _await_start(self) -> None:
        if not self._started:
            try:
                with self._limited(self._settings.start_timeout_s):
                    read_message(self._output)
            except (OSError, EOFError, ValueError):
                self._broken = True
                log.warning("video_worker_did_not_start", late=self._late)
                raise RuntimeError("a video worker did not start; what it printed says why") from None
            self._started = True

    @contextmanager
    def _limited(self, timeout_s: float) -> Iterator[None]:
        """End the process where what is done within takes too long."""
        timer = threading.Timer(timeout_s, self._expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()  # it may be ending the process at this moment

    def _expire(self) -> None:
        self._late = self._broken = True
        self._process.kill()

    def _death(self) -> Exception:
        """Return what the end of the process means for the video that it was working on."""
        status = self._process.wait() if self._late else self._status()
        log.warning("video_worker_ended", status=status, late=self._late)
        if self._late:
            return MediaTooLarge(f"Decoding the video takes longer than {self._settings.timeout_s:g} seconds.")
        if status is not None and status < 0:
            return MediaUnreadable("The video makes its decoder fail.")
        return RuntimeError(f"a video worker ended with status {status}; what it printed says why")

    def _status(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout=5)
        return None


def _environment() -> dict[str, str]:
    """Return what a worker is told: where modules are, and to reserve little memory. No setting, no secret."""
    return {
        "PATH": os.defpath,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
        "LC_ALL": "C.UTF-8",
    }


def _picture_of(header: Header, content: bytearray, tiling: TilingSpec, limits: VideoLimits) -> Picture:
    tiles = np.frombuffer(content, np.uint8).reshape(-1, tiling.tile_size, tiling.tile_size, 3)
    frames = tuple(VideoFrame(int(index), float(time_s)) for index, time_s in header["frames"])
    grid = Grid(int(header["columns"]), int(header["rows"]))
    assert 0 < len(tiles) <= limits.max_tiles
    return Picture(int(header["width"]), int(header["height"]), grid, tiles, frames)
