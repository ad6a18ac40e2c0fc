"""How a process of a service is: its release, its memory, the checkpoint that it serves, and the store that it uses."""

import os
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Protocol

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

log = structlog.get_logger()
_CGROUP: Final = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A checkpoint that is served: its directory's name, its widths, in what type and where it is computed."""

    name: str
    hidden_size: int
    tokens_per_tile: int
    data_type: str
    devices: str


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """A store as it is seen from here; of one that does not answer nothing more is known."""

    is_reachable: bool
    eviction_policy: str = ""
    used_bytes: int = 0
    max_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """How a process is. `unix_time_s` is its clock; memory is 0 where that cannot be told."""

    version: str
    unix_time_s: float
    resident_bytes: int
    available_bytes: int
    model: ModelStatus | None = None
    store: StoreStatus | None = None


class StatusSource(Protocol):
    """What can say how its process is."""

    async def status(self) -> ServiceStatus:
        """Return how it is at this moment."""


class ProcessStatus:
    """How this process is. `redis` is the store that it uses; a model is known once it has been loaded."""

    def __init__(self, redis: Redis | None = None) -> None:
        self._redis = redis
        self.model: ModelStatus | None = None

    async def status(self) -> ServiceStatus:
        """Return how it is at this moment; a store that does not answer in its own time counts as away."""
        store = await read_store(self._redis.info) if self._redis is not None else None
        return ServiceStatus(release(), time.time(), resident_bytes(), available_bytes(), self.model, store)


async def read_store(info: Callable[[str], Awaitable[Mapping[str, Any]]]) -> StoreStatus:
    """Return how a store is; `info` asks for a section of what it says of itself."""
    try:
        memory = await info("memory")
    except (RedisError, OSError, TimeoutError, ValueError) as error:
        log.warning("store_status_failed", error=type(error).__name__)
        return StoreStatus(is_reachable=False)
    return store_of(memory)


def store_of(memory: Mapping[str, Any]) -> StoreStatus:
    """Return how a store is that says this of its memory."""
    policy, used, most = (memory.get(name) for name in ("maxmemory_policy", "used_memory", "maxmemory"))
    return StoreStatus(True, str(policy or ""), _count(used), _count(most))


def release() -> str:
    """Return the version of this software; empty where it is not installed."""
    with suppress(PackageNotFoundError):
        return version("internvl-serving")
    return ""


def resident_bytes() -> int:
    """Return the memory that this process holds; 0 where that cannot be told."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def available_bytes(cgroup: Path = _CGROUP, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Return the memory that this process can still get, in its container; 0 where that cannot be told."""
    room = [found for found in (_machine_room(meminfo), _container_room(cgroup)) if found is not None]
    return min(room, default=0)


def _machine_room(meminfo: Path) -> int | None:
    with suppress(OSError, ValueError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return None


def _container_room(cgroup: Path) -> int | None:
    """Return what is left below the limit of a container, of version 2 of cgroups; None without one."""
    with suppress(OSError, ValueError):  # "max" is no number: there is no limit
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        # The kernel gives back files that nobody has touched lately before it refuses memory.
        counts = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return max(1, limit - used + int(counts.get("inactive_file", 0)))
    return None


def _count(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and value > 0 else 0
