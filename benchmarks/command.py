"""What the benchmarks that start whole systems share: their options, and what the options stand for."""

import argparse
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, Final

from benchmarks.machine import high_priority
from benchmarks.ours import OurSystem
from benchmarks.peers.peer import Peer, PeerError
from benchmarks.peers.transformers import DEFAULT_VENV as TRANSFORMERS_VENV
from benchmarks.peers.transformers import TransformersServe
from benchmarks.peers.vllm import DEFAULT_VENV as VLLM_VENV
from benchmarks.peers.vllm import Vllm, VllmOptions

PEERS: Final = ("vllm", "transformers")
SETTINGS_NOTE: Final = (
    "Settings of our services come from the environment, such as LLM_MAX_BATCH_TOKENS=1024 or VISION_THREADS=2; "
    "--dtype is for both services, and for the peers."
)


def add_system_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is started, and how."""
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory in the -hf layout")
    parser.add_argument(
        "--peer", action="append", choices=PEERS, default=[], help="a peer to compare with; may be repeated"
    )
    parser.add_argument("--without-us", action="store_true", help="measure the peers only")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="vLLM does not compile: starts sooner, decodes slower")
    parser.add_argument("--kv-cache-gib", type=int, default=2, help="vLLM's KV cache (default: %(default)s)")
    parser.add_argument("--vllm-venv", type=Path, default=VLLM_VENV, help="default: %(default)s")
    parser.add_argument("--transformers-venv", type=Path, default=TRANSFORMERS_VENV, help="default: %(default)s")
    parser.add_argument(
        "--high-priority",
        action="store_true",
        help="raise the share of the CPUs of this session and of all that is measured; needs root, see the README",
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed asks the same (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")


def peers_of(arguments: argparse.Namespace) -> list[Peer]:
    """Return what the options ask to be measured, ours first; raise `PeerError` where that is nothing."""
    if not (arguments.model / "config.json").is_file():
        advice = f"Write one: python -m benchmarks.checkpoints small {arguments.model}"
        raise PeerError(f"{arguments.model} holds no checkpoint. {advice}")
    make: dict[str, Callable[[], Peer]] = {
        "vllm": lambda: Vllm(
            VllmOptions(arguments.dtype, arguments.eager, arguments.kv_cache_gib), arguments.vllm_venv
        ),
        "transformers": lambda: TransformersServe(arguments.dtype, arguments.transformers_venv),
    }
    ours: list[Peer] = [] if arguments.without_us else [OurSystem(arguments.dtype)]
    peers = [*ours, *(make[name]() for name in dict.fromkeys(arguments.peer))]
    if not peers:
        raise PeerError("there is nothing to measure: give --peer, or leave --without-us out.")
    return peers


def priority_of(arguments: argparse.Namespace) -> AbstractContextManager[None]:
    """Return the context in which to measure; raise `PeerError` on the way in where priority may not be raised."""
    if not arguments.high_priority:
        return nullcontext()
    if os.geteuid() != 0:
        raise PeerError("--high-priority needs root.")
    return high_priority()


def machine_facts() -> dict[str, Any]:
    """Return what figures are worth nothing without."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def progress(text: str) -> None:
    """Show how far a benchmark is: on standard error, so that tables can be redirected."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def exit_with(work: Callable[[], None]) -> None:
    """Do the work of a command; end with one line and exit code 1 where it cannot be done.

    A request to end is what Ctrl-C is: whatever was started has to be stopped first.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        work()
    except PeerError as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
