"""Has this process keep the memory that it frees, for what it allocates next."""

import ctypes
import sys
from typing import Final

# glibc's mallopt: what it is asked for, and how much.
_KEPT_BYTES: Final = 256 << 20
_OPTIONS: Final = (
    (-8, 1),  # M_ARENA_MAX: threads share one heap, which need not be given back part by part
    (-3, _KEPT_BYTES),  # M_MMAP_THRESHOLD: below this, nothing is mapped for one use
    (-1, _KEPT_BYTES),  # M_TRIM_THRESHOLD: nor is the end of the heap given back
)


def keep_freed_memory() -> bool:
    """Have the C library reuse blocks of up to 256 MiB instead of giving them back; return whether it will.

    A model's step allocates and frees the same blocks in every layer. Pages that were given back are faulted in and
    zeroed again, which takes longer than the arithmetic on them. Call it before other threads are started: it is the
    whole process's setting.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*option) == 1 for option in _OPTIONS)
