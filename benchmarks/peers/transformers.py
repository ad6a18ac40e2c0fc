"""transformers' own server beside us: `python -m benchmarks.peers.transformers install`, and `serve --model DIR`.

It takes requests one after another, and fields that it does not know are refused.
"""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from benchmarks.peers.environment import ROOT, Environment, parser_of, say
from benchmarks.peers.http_server import HttpPeer
from benchmarks.peers.openai_target import OpenAiTarget, connected
from benchmarks.peers.peer import PeerError
from benchmarks.peers.running import serve_until_interrupted
from benchmarks.peers.torchvision_patch import patch_torchvision

DEFAULT_VENV: Final = ROOT / "transformers"
_TORCH: Final = "torch==2.13.0"
_MODULE: Final = "benchmarks.peers.transformers"


def install(environment: Environment) -> None:
    """Make the environment: 2 GB, some minutes. What is there already is kept; raises `PeerError`."""
    environment.create()
    environment.install(_TORCH)
    environment.install(_TORCH, "torchvision==0.28.0", "transformers[serving]==5.23.0", "pillow")
    patch_torchvision(environment.packages)
    environment.execute("from transformers import AutoProcessor, InternVLForConditionalGeneration")
    say(f"transformers is ready in {environment.directory}")


class TransformersServe(HttpPeer):
    """`transformers serve` as a peer, in the environment at `venv`. Loads the model with the first request."""

    name = "transformers"
    start_timeout_s = 600.0

    def __init__(self, dtype: str = "bfloat16", venv: Path = DEFAULT_VENV) -> None:
        super().__init__()
        self._dtype = dtype
        self._environment = Environment(venv)

    def command(self, checkpoint: Path, port: int) -> list[str]:
        """See `HttpPeer`."""
        program = self._environment.require("transformers", _MODULE)
        command = [str(self._environment.python), str(program), "serve", str(checkpoint)]
        return [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", self._dtype]

    def variables(self) -> dict[str, str]:
        """See `HttpPeer`."""
        return {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}

    @asynccontextmanager
    async def connect(self, address: str) -> AsyncIterator[OpenAiTarget]:
        """See `Peer`."""
        async with connected(address, self.name, str(self._checkpoint)) as target:
            yield target


def main() -> None:
    """Install transformers' server, or serve a checkpoint with it."""
    parser = parser_of(_MODULE, "transformers serve, in an environment of its own.", DEFAULT_VENV)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    try:
        if arguments.action == "install":
            install(Environment(arguments.venv))
        else:
            serve_until_interrupted(TransformersServe(arguments.dtype, arguments.venv), arguments.model)
    except PeerError as error:
        sys.exit(f"{_MODULE}: {error}")


if __name__ == "__main__":
    main()
