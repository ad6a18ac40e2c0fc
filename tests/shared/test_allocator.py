"""What is freed stays with the process: the next block of the size needs no new pages."""

import subprocess
import sys
from pathlib import Path

import pytest

_MEASURE = """
import resource
from shared.allocator import keep_freed_memory

def faults_of_a_block():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(40 << 20)[::4096] = bytes(10240)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given = faults_of_a_block(), faults_of_a_block()
assert keep_freed_memory()
faults_of_a_block()
print(given[1], faults_of_a_block())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_a_block_that_was_freed_is_used_again_without_page_faults() -> None:
    command = [sys.executable, "-c", _MEASURE]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 1000
    assert after < 100
