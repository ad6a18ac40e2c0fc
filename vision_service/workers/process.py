"""One worker process, as the service sees it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, TypeVar

import structlog

from shared.errors import MediaTooLarge, MediaUnreadable
from vision_service.refusals import refusal_of
from vision_service.workers.channel import Header, channel_pair
from vision_service.workers.settings import WorkerSettings

T = TypeVar("T")
log = structlog.get_logger()
WORKER: Final = (sys.executable, "-m", "vision_service.workers.worker")
_DEATH_TIMEOUT_S: Final = 5.0  # for a process that has closed its channel


class WorkerProcess:
    """A process and the channel to it. Used by one thread at a time, but `kill` may be called from any.

    The kernel ends the process with the thread that made this object.
    """

    def __init__(self, settings: WorkerSettings, command: Sequence[str]) -> None:
        self._settings = settings
        self._kind = settings.work.kind
        self._media = 0
        self._broken = False
        self._killed = False
        self.started = False
        self.locked = False
        self._channel, far = channel_pair()
        with far:
            self._process = subprocess.Popen(  # noqa: S603  # our own module, with settings of ours
                [*command, settings.to_json()],
                stdin=far.fileno(),
                stdout=subprocess.DEVNULL,  # where libraries print
                env=_environment(),
                process_group=0,  # a terminal's Ctrl-C is for the service; the session's share of the CPU is kept
            )

    @property
    def reusable(self) -> bool:
        """Whether the process can take another medium."""
        return not self._broken and self._media < self._settings.max_media and self._process.poll() is None

    def await_start(self) -> None:
        """Return once the process takes media; raises `RuntimeError` where it never will."""
        if self.started:
            return
        try:
            header, _ = self._channel.receive(time.monotonic() + self._settings.start_timeout_s)
        except (OSError, EOFError, ValueError) as error:
            self.kill()
            log.warning("media_worker_did_not_start", kind=self._kind, late=isinstance(error, TimeoutError))
            raise RuntimeError("a media worker did not start; what it printed says why") from None
        self.started, self.locked = True, bool(header.get("locked"))

    def ask(self, request: Header, content: bytes, read: Callable[[Header, memoryview], T]) -> T:
        """Return what `read` makes of the answer of a process that has started.

        Raises `MediaUnreadable`, also where the decoder crashes, `MediaTooLarge`, also where it takes too much time or
        memory, `VideoRangeEmpty`, and `RuntimeError` where the process fails for another reason.
        """
        self._media += 1
        deadline = time.monotonic() + self._settings.timeout_s
        try:
            self._channel.send(request, content, deadline)
            header, answer = self._channel.receive(deadline)
            if "reason" not in header:
                return read(header, answer)
            refusal = refusal_of(header)
        except TimeoutError:
            self.kill()
            raise self._death(late=True) from None
        except (OSError, EOFError):
            self._broken = True
            raise self._death(late=False) from None
        except (KeyError, TypeError, ValueError, OverflowError):
            self.kill()
            raise RuntimeError("a media worker answered what is no answer") from None
        raise refusal

    def kill(self) -> None:
        """End the process; a call that waits for it fails."""
        self._broken = self._killed = True
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """End the process and close the channel; for the thread that used it last."""
        self.kill()
        self._channel.close()

    def _death(self, *, late: bool) -> Exception:
        """Return what the end of the process means for the medium that it was working on."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_DEATH_TIMEOUT_S)
        status = self._process.returncode
        log.warning("media_worker_ended", kind=self._kind, status=status, late=late)
        if late:
            return MediaTooLarge(f"Decoding the {self._kind} takes longer than {self._settings.timeout_s:g} seconds.")
        if self._killed:
            return RuntimeError("the media workers have been closed")
        if status == -signal.SIGKILL:  # by the kernel, which is out of memory
            return MediaTooLarge(f"Decoding the {self._kind} takes more memory than there is.")
        if status is not None and status < 0:
            return MediaUnreadable(f"The {self._kind} makes its decoder fail.")
        return RuntimeError(f"a media worker ended with status {status}; what it printed says why")


def _environment() -> dict[str, str]:
    """Return what a worker is told: where modules are, and to reserve little memory. No setting, no secret."""
    return {
        "PATH": os.defpath,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
        "LC_ALL": "C.UTF-8",
    }
