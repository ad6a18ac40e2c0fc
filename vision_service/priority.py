"""Lowers the model's share of the CPUs, so that what runs beside it on a machine does not wait for it."""

import os
import sys
import threading
from pathlib import Path

import structlog

log = structlog.get_logger()

_AUTOGROUP = Path("/proc/self/autogroup")


def lower_priority(nice: int) -> None:
    """Lower the priority of the calling thread, and of the threads that it will start, to `nice` (0 to 19).

    Elsewhere than on Linux that of the whole process. Where Linux shares the CPUs out by session first (autogroup),
    niceness counts within a session only: then the session's is lowered as well, if it is this process's own.
    Does nothing for 0; what the system refuses is logged and left.
    """
    if not nice:
        return
    try:
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
            if _AUTOGROUP.exists() and os.getsid(0) == os.getpid():
                _AUTOGROUP.write_text(str(nice))
        else:
            os.nice(nice)
    except OSError as error:
        log.warning("priority_not_lowered", nice=nice, error=type(error).__name__)
