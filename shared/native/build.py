"""Compiles the native kernels where there is a C compiler: `python -m shared.native.build`. Installing does it too."""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

LIBRARY: Final = Path(__file__).with_name("kernels.so")
_SOURCES: Final = ("few_rows.c", "decoding.c", "attention.c", "layers.c")
# Roundings are where the source has them.
_FLAGS: Final = ("-O3", "-Wall", "-Wextra", "-fPIC", "-fopenmp", "-ffp-contract=off")
_PROCESSOR: Final = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mamx-tile", "-mamx-bf16")


def compile_kernels() -> str | None:
    """Compile the kernels beside their source, in place of what lies there; return why that cannot be, or None."""
    LIBRARY.unlink(missing_ok=True)
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "they are for Linux on x86-64."
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        return "there is no C compiler (cc)."
    with tempfile.TemporaryDirectory(dir=LIBRARY.parent) as scratch:
        objects = [f"{scratch}/{source}.o" for source in _SOURCES]
        partial = Path(scratch, LIBRARY.name)
        compiling = [
            [compiler, *_FLAGS, *_PROCESSOR, "-c", str(LIBRARY.with_name(source)), "-o", target]
            for source, target in zip(_SOURCES, objects, strict=True)
        ]
        # Linked without OpenMP: its functions are those that torch brings.
        for command in (*compiling, [compiler, "-shared", *objects, "-lm", "-o", str(partial)]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - no user's words
            if done.returncode:
                return f"{' '.join(command)} failed.\n{done.stderr}"
        partial.replace(LIBRARY)
    return None


if __name__ == "__main__":
    sys.exit(compile_kernels())
