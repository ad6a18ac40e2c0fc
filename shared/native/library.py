"""The native kernels, as functions that Python can call: addresses and sizes, checked by nobody.

Imports torch, so it is for services with a model only.
"""

import ctypes
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import torch

from shared.native.build import LIBRARY

Function = Callable[..., None]
_NEEDED: Final = frozenset({"amx_bf16", "amx_tile", "avx512_bf16", "avx512bw", "avx512vl"})
_OPENMP: Final = re.compile(r"\S*/lib(?:g|i)?omp[^/\s]*$", re.MULTILINE)
_ADDRESS, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


@dataclass(frozen=True, slots=True)
class Kernels:
    """The functions, named and explained in the sources in C. They let other threads run meanwhile.

    Those that attend and `decode_layers` raise `MemoryError`.
    """

    few_rows_linear: Function
    rms_norm: Function
    silu_and_multiply: Function
    rotate: Function
    largest: Function
    attend_to_cache: Function
    attend: Function
    decode_layers: Function


_ARGUMENTS: Final = {
    "few_rows_linear": (
        *(_ADDRESS, _LONG),  # inputs
        *(_ADDRESS, _ADDRESS),  # matrix, bias
        *(_ADDRESS, _LONG),  # what is added
        *(_ADDRESS, _LONG),  # outputs
        *(_INT, _INT, _INT),  # rows, outputs, inputs
    ),
    "rms_norm": (_ADDRESS, _LONG, _ADDRESS, _FLOAT, _ADDRESS, _LONG, _LONG),
    "silu_and_multiply": (_ADDRESS, _ADDRESS, _LONG, _LONG),
    "rotate": (_ADDRESS, _LONG, _ADDRESS, _ADDRESS, _LONG, _LONG, _LONG),
    "largest": (_ADDRESS, _INT, _LONG, _LONG, _LONG, _ADDRESS, _ADDRESS),
    "attend_to_cache": (
        *(_ADDRESS, _LONG, _ADDRESS),  # queries, cache
        *(_ADDRESS, _ADDRESS, _ADDRESS, _LONG),  # lengths, starts, tables, how many
        *(_LONG, _LONG, _LONG, _LONG, _FLOAT),  # block size, heads, kv heads, head dim, scale
        _ADDRESS,  # outputs
    ),
    "attend": (
        *(_ADDRESS, _LONG),  # queries
        *(_ADDRESS, _LONG, _ADDRESS, _LONG),  # keys, values
        *(_ADDRESS, _LONG),  # table, block size
        *(_LONG, _LONG),  # how many queries, keys
        *(_LONG, _LONG, _LONG, _INT, _FLOAT),  # heads, kv heads, head dim, whether causal, scale
        _ADDRESS,  # outputs
    ),
    "decode_layers": (
        *(_ADDRESS, _INT),  # hidden states, rows
        *(_ADDRESS, _LONG, _ADDRESS, _ADDRESS),  # layers, how many, the norm behind them, sizes
        *(_FLOAT, _FLOAT),  # epsilon of norms, scale
        *(_ADDRESS, _ADDRESS),  # cosines, sines
        *(_ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS),  # slots, lengths, starts, tables
    ),
}
_ALLOCATING: Final = ("attend_to_cache", "attend", "decode_layers")  # these say whether there was no memory


@cache
def kernels() -> Kernels | None:
    """Return the kernels, or None where they were not compiled or this machine cannot run them."""
    if not (LIBRARY.is_file() and _has_matrix_units()):
        return None
    try:
        for path in _openmp_of(Path("/proc/self/maps").read_text(encoding="utf-8")):
            ctypes.CDLL(path, ctypes.RTLD_GLOBAL)  # it is loaded already: now its names can be found
        library = ctypes.CDLL(str(LIBRARY))
        if library.allow_tiles():
            return None
        found = {name: getattr(library, name) for name in _ARGUMENTS}
    except (OSError, AttributeError):
        return None
    for name, function in found.items():
        function.argtypes, function.restype = _ARGUMENTS[name], None
        if name in _ALLOCATING:
            function.restype, function.errcheck = _INT, _require_memory
    return Kernels(**found)


def _require_memory(failed: int, function: object, arguments: object) -> None:
    if failed:
        raise MemoryError("There is no memory for attention.")


def _has_matrix_units() -> bool:
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    flags = next((line for line in facts.splitlines() if line.startswith("flags")), "")
    return _NEEDED.issubset(flags.split())


def _openmp_of(mapped: str) -> Sequence[str]:
    """Return the path of the OpenMP library that torch computes with, as `/proc/self/maps` has it; none if in doubt.

    A second one beside it would have threads of its own, and twice as many as there are cores.
    """
    paths = sorted(set(_OPENMP.findall(mapped)))
    own = [path for path in paths if Path(path).is_relative_to(Path(torch.__file__).parent)]
    return own or paths[:1]
