"""Has the native kernels compiled while the package is built or installed, where there is a C compiler to do it.

Without them everything works: decoding on a CPU takes half as long again.
"""

import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeKernels(BuildHookInterface):  # type: ignore[type-arg]
    """Puts the compiled library beside its source, and into the wheel, which then is for this platform only."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the files are collected."""
        sys.path.insert(0, self.root)
        from shared.native.build import LIBRARY, compile_kernels

        if complaint := compile_kernels():
            self.app.display_warning(f"Native kernels are left out, and decoding on a CPU is slower: {complaint}")
            return
        build_data["artifacts"].append(LIBRARY.relative_to(Path(self.root).resolve()).as_posix())
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
