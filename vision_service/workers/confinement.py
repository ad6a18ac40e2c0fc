"""What a worker takes from itself before it meets a medium: memory, a life of its own, and calls of the system."""

import ctypes
import resource
import signal
import sys
from typing import Final

from vision_service.workers import seccomp

_PR_SET_PDEATHSIG: Final = 1


def limit_memory(memory_bytes: int) -> None:
    """Bound the address space; a crash leaves no core file."""
    for limit, value in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CORE, 0)):
        _, most = resource.getrlimit(limit)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(limit, (value, value))


def die_with_parent() -> None:
    """Have the kernel end this process with the thread that made it, even where that one is killed.

    A worker that waits ends with its channel anyway; this is for one that is at work.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def lock() -> bool:
    """Give up the network, files, programs and other processes; return whether the kernel agreed."""
    return seccomp.confine()
