"""How a process says that it is."""

import os
from pathlib import Path

from redis.asyncio import Redis

from shared.rpc.status_messages import status_message, status_of
from shared.service_status import (
    ModelStatus,
    ProcessStatus,
    ServiceStatus,
    StoreStatus,
    available_bytes,
    resident_bytes,
)
from tests.valkey import running_valkey

MODEL = ModelStatus("InternVL3-1B", 896, 256, "bfloat16", "cuda:0")


async def test_a_process_knows_its_store_once_it_answers_and_when_it_is_gone() -> None:
    async with running_valkey() as server, Redis.from_url(server.url, socket_timeout=5) as redis:
        await redis.config_set("maxmemory", 1 << 30)
        await redis.config_set("maxmemory-policy", "allkeys-lru")
        store = (await ProcessStatus(redis).status()).store
        assert store is not None
        assert (store.is_reachable, store.eviction_policy, store.max_bytes) == (True, "allkeys-lru", 1 << 30)
        assert 0 < store.used_bytes < 1 << 30
        server.kill()
        assert (await ProcessStatus(redis).status()).store == StoreStatus(is_reachable=False)


async def test_a_process_without_a_store_or_a_model_says_neither() -> None:
    process = ProcessStatus()
    first = await process.status()
    assert (first.store, first.model) == (None, None)
    assert first.version
    assert first.resident_bytes > 1 << 20
    process.model = MODEL
    assert (await process.status()).model == MODEL


def test_the_memory_of_a_container_counts_where_it_is_less_than_the_machines(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 4096 kB\nMemAvailable: 2048 kB\n")
    assert available_bytes(tmp_path, meminfo) == 2048 << 10
    for name, content in (("memory.max", "max"), ("memory.current", "1000"), ("memory.stat", "inactive_file 200\n")):
        (tmp_path / name).write_text(content)
    assert available_bytes(tmp_path, meminfo) == 2048 << 10
    (tmp_path / "memory.max").write_text("5000")
    assert available_bytes(tmp_path, meminfo) == 5000 - 1000 + 200
    assert available_bytes(tmp_path / "nowhere", tmp_path / "nowhere") == 0


def test_resident_memory_is_that_of_this_process() -> None:
    pages = int(Path(f"/proc/{os.getpid()}/statm").read_text().split()[1])
    assert resident_bytes() > pages * os.sysconf("SC_PAGE_SIZE") // 2


def test_a_status_survives_its_message() -> None:
    bare = ServiceStatus("1.2", 1_700_000_000.5, 10, 20)
    whole = ServiceStatus("1.2", 0.25, 10, 20, MODEL, StoreStatus(True, "noeviction", 30, 40))
    for status in (bare, whole):
        assert status_of(status_message(status)) == status
