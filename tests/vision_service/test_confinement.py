"""A process that decodes reaches neither network nor files nor other processes, and decodes all the same."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.media_pools import NEVER, media_pool
from vision_service.preprocess.image import preprocess
from vision_service.preprocess.tiling import TilingSpec

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "tests/golden/images"
SPEC = TilingSpec(28, 1, 12, thumbnail=True)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")

# Locks itself up, tries something, and says how it went.
PRISONER = """
import os, resource, signal, socket, subprocess, sys, threading
from vision_service.workers import confinement
parent = os.getppid()
assert confinement.lock()
try:
    {attempt}
except OSError as error:
    print(type(error).__name__)
else:
    print("done")
"""


def outcome_of(attempt: str) -> str:
    command = [sys.executable, "-c", PRISONER.format(attempt=attempt)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(
    "attempt",
    [
        "socket.socket()",
        "socket.socketpair()",
        "open('/etc/passwd')",
        "open(f'/proc/{parent}/environ')",
        "os.unlink('/nowhere')",
        "os.rename('/nowhere', '/elsewhere')",
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "subprocess.run(['/bin/true'])",
        "os.kill(parent, 0)",
        "os.pidfd_open(parent)",
        "resource.prlimit(parent, resource.RLIMIT_NOFILE)",
    ],
)
def test_what_a_decoder_does_not_need_is_refused(attempt: str) -> None:
    assert outcome_of(attempt) == "PermissionError"


@pytest.mark.parametrize(
    "attempt",
    [
        "thread = threading.Thread(target=print, args=('',)); thread.start(); thread.join()",
        "bytearray(1 << 28)",
        "os.kill(os.getpid(), 0)",
        "resource.getrlimit(resource.RLIMIT_AS)",
        "os.urandom(8)",
    ],
)
def test_what_a_decoder_needs_is_allowed(attempt: str) -> None:
    assert outcome_of(attempt) == "done"


# The worker itself, whose decoder first tries to reach the network.
PROBING_WORKER = """
import socket
from vision_service.workers import answers, worker

real = answers.preprocess

def probe(content, tiling, max_pixels):
    try:
        socket.socket()
    except PermissionError:
        return real(content, tiling, max_pixels)
    raise AssertionError("a worker has a socket")

answers.preprocess = probe
worker.main()
"""


async def test_a_worker_has_no_network_and_decodes() -> None:
    content = (IMAGES / "rgb_landscape.png").read_bytes()
    async with media_pool(command=(sys.executable, "-c", PROBING_WORKER)) as at:
        picture = await at.prepare(content, SPEC, None, NEVER)
    assert np.array_equal(picture.tiles, preprocess(content, SPEC, 1_000_000).tiles)
