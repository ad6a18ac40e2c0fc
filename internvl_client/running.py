"""The note that `internvl up` leaves for other commands: where its system listens."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunningSystem:
    """A system that runs on this machine: the gateway's address, the model's directory, the starter's process id.

    `metrics` are the addresses at which its services answer `GET /metrics`, by the services' names.
    """

    address: str
    model: str
    pid: int
    metrics: Mapping[str, str] = field(default_factory=dict)


def announce(system: RunningSystem) -> None:
    """Write the note; a later one replaces it. Only this user can read it."""
    path = _note()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_suffix(f".{system.pid}")
    partial.touch(mode=0o600)
    partial.write_text(json.dumps(asdict(system)), encoding="utf-8")
    partial.replace(path)


def withdraw(system: RunningSystem) -> None:
    """Remove the note if it is still this system's."""
    if _read() == system:
        _note().unlink(missing_ok=True)


def find_running() -> RunningSystem | None:
    """Return the system that the note speaks of, if the process that wrote it is still there."""
    system = _read()
    return system if system and _is_alive(system.pid) else None


def _note() -> Path:
    base = os.environ.get("XDG_RUNTIME_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "internvl-serving" / "running.json"


def _read() -> RunningSystem | None:
    with suppress(OSError, ValueError, TypeError):
        return RunningSystem(**json.loads(_note().read_text(encoding="utf-8")))
    return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
