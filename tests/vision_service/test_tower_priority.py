"""A niced model gives way: its thread and those it starts, not the event loop's; a session only where it is our own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vision_service.priority import lower_priority

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="threads have a niceness of their own on Linux only")
_PROGRAM = """
import json, os, sys, threading
from pathlib import Path
from vision_service.priority import lower_priority

def niceness():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

def in_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()

found = {"before": niceness()}

def model():
    lower_priority(int(sys.argv[1]))
    found["model"] = niceness()
    in_thread(lambda: found.update(worker=niceness()))

in_thread(model)
found["loop"] = niceness()
in_thread(lambda: found.update(other=niceness()))
group = Path("/proc/self/autogroup")
words = group.read_text().split() if group.exists() else []  # a container's first session has an empty one
found["session"] = int(words[-1]) if words else None
print(json.dumps(found))
"""


def niceness(nice: int, own_session: bool) -> dict[str, Any]:
    command = [sys.executable, "-c", _PROGRAM, str(nice)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, start_new_session=own_session)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@linux
def test_the_models_threads_give_way_and_no_others() -> None:
    found = niceness(7, own_session=True)
    assert found["model"] == found["worker"] == 7
    assert found["loop"] == found["other"] == found["before"]


@linux
@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="this kernel does not group by session")
def test_a_session_gives_way_only_where_it_is_the_processs_own() -> None:
    assert niceness(7, own_session=True)["session"] == 7
    assert niceness(7, own_session=False)["session"] != 7


@linux
def test_zero_changes_nothing() -> None:
    found = niceness(0, own_session=True)
    assert found["model"] == found["before"]


@linux
def test_what_the_system_refuses_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: int) -> None:
        raise PermissionError

    monkeypatch.setattr("vision_service.priority.os.setpriority", refuse)
    lower_priority(5)
