"""A seccomp filter for processes that decode: no network, no program, no file, no other process.

What a decoder needs is already there: memory, threads, and the channel it was given. Everything refused fails with
EPERM, so that a library that tries falls back or raises. The filter holds for every thread and cannot be taken off.
"""

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Iterator
from typing import Final

_PR_SET_NO_NEW_PRIVS: Final = 38
_SET_MODE_FILTER, _ALL_THREADS = 1, 1
_CLONE_THREAD: Final = 0x10000
_X32: Final = 0x40000000  # another set of numbers for the same calls of x86-64

# Classic BPF, and where it finds the parts of `struct seccomp_data`.
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000

_ARCHITECTURES: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_SECCOMP: Final = {"x86_64": 317, "aarch64": 277}

# Numbers on x86-64 and on ARM64, None where there is no such call.
_REFUSED: Final[dict[str, tuple[int | None, int | None]]] = {
    # network
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242),
    # programs and processes
    "execve": (59, 221), "execveat": (322, 281), "fork": (57, None), "vfork": (58, None),
    # files
    "open": (2, None), "creat": (85, None), "openat": (257, 56), "openat2": (437, 437), "open_by_handle_at": (304, 265),
    "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "mkdir": (83, None),
    "mkdirat": (258, 34), "rmdir": (84, None), "mknod": (133, None), "mknodat": (259, 33), "truncate": (76, 45),
    "chmod": (90, None), "fchmodat": (268, 53), "chown": (92, None), "lchown": (94, None), "fchownat": (260, 54),
    # other processes' memory, handles and signals
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "shmget": (29, 194),
    "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    # ways around a filter, and corners of the kernel that nobody here needs
    "io_uring_setup": (425, 425), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "unshare": (272, 97), "setns": (308, 268),
}  # fmt: skip
# Calls for this process only: their first argument says which one.
_OWN_PROCESS: Final = {"kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261)}
_CLONE: Final = (56, 220)  # for threads only
_CLONE3: Final = (435, 435)  # its flags lie in memory, which a filter cannot read: libraries then use `clone`


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def confine() -> bool:
    """Put the filter on this process; return False where the system has none or refuses it."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _ARCHITECTURES:
        return False
    program = _program(machine, os.getpid())
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    count = len(program) // 8
    return bool(
        libc.syscall(_SECCOMP[machine], _SET_MODE_FILTER, _ALL_THREADS, ctypes.byref(_Program(count, program))) == 0
    )


def _program(machine: str, process_id: int) -> bytes:
    column = list(_ARCHITECTURES).index(machine)
    return b"".join(
        struct.pack("<HBBI", code, if_true, if_false, value)
        for code, if_true, if_false, value in _instructions(_ARCHITECTURES[machine], column, process_id)
    )


def _instructions(architecture: int, column: int, process_id: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield operation, instructions to skip where it holds, to skip where it does not, and operand."""
    refuse = (_RETURN, 0, 0, _REFUSE | errno.EPERM)
    allow = (_RETURN, 0, 0, _ALLOW)
    yield (_LOAD, 0, 0, _ARCHITECTURE)
    yield (_IF_EQUAL, 1, 0, architecture)
    yield refuse
    yield (_LOAD, 0, 0, _NUMBER)
    yield (_IF_AT_LEAST, 0, 1, _X32)
    yield refuse
    for number in (numbers[column] for numbers in _REFUSED.values()):
        if number is not None:
            yield (_IF_EQUAL, 0, 1, number)
            yield refuse
    yield (_IF_EQUAL, 0, 1, _CLONE3[column])
    yield (_RETURN, 0, 0, _REFUSE | errno.ENOSYS)
    yield (_IF_EQUAL, 0, 4, _CLONE[column])
    yield (_LOAD, 0, 0, _FIRST_ARGUMENT)
    yield (_IF_ANY_BIT, 0, 1, _CLONE_THREAD)
    yield allow
    yield refuse
    for numbers in _OWN_PROCESS.values():
        yield (_IF_EQUAL, 0, 5, numbers[column])
        yield (_LOAD, 0, 0, _FIRST_ARGUMENT)
        yield (_IF_EQUAL, 1, 0, process_id)
        yield (_IF_EQUAL, 0, 1, 0)  # the caller itself; of `kill` its group, which is the worker's own
        yield allow
        yield refuse
    yield allow
