"""The stores' own files, given to a real Valkey: what the services need is allowed, and nothing else."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import redis
from redis.exceptions import NoPermissionError

from deploy.kustomize.cluster_secrets import cluster_secrets
from tests.deploy.running_store import running_store

POLICIES = {"embeddings": "allkeys-lfu", "conversations": "noeviction"}
STORES = {"embeddings": ("vision", "llm"), "conversations": ("gateway",)}


@contextmanager
def clients_of(name: str, folder: Path) -> Iterator[dict[str, redis.Redis]]:
    """Run a store and yield a client of each of its users."""
    made, _ = cluster_secrets("somebody")
    with running_store(name, folder, made) as port, ExitStack() as stack:
        yield {user: stack.enter_context(_client(made[f"{user}-secrets"], port)) for user in STORES[name]}


def _client(files: dict[str, str], port: int) -> redis.Redis:
    (url,) = [text for file, text in files.items() if file.endswith("redis_url")]
    return redis.Redis.from_url(re.sub(r"@[^/]+/", f"@127.0.0.1:{port}/", url))


@pytest.mark.parametrize("name", STORES)
def test_a_store_takes_its_configuration_and_lets_its_users_in(name: str, tmp_path: Path) -> None:
    with clients_of(name, tmp_path) as clients:
        for client in clients.values():
            client.set("ivl:something", b"1", ex=60)
            assert client.get("ivl:something") == b"1"
            # What `internvl doctor` tells of a store, and the gateway warns of at start.
            assert client.info("memory")["maxmemory_policy"] == POLICIES[name]


@pytest.mark.parametrize("name", STORES)
def test_users_may_neither_run_scripts_nor_change_the_store_nor_touch_other_keys(name: str, tmp_path: Path) -> None:
    forbidden = (
        ("EVAL", "return 1", "0"),
        ("CONFIG", "SET", "maxmemory", "1"),
        ("CONFIG", "GET", "*"),
        ("FLUSHALL",),
        ("KEYS", "*"),
        ("ACL", "LIST"),
        ("GET", "somebody-elses"),
        ("SUBSCRIBE", "somebody-elses"),
    )
    with clients_of(name, tmp_path) as clients:
        for client in clients.values():
            for command in forbidden:
                with pytest.raises(NoPermissionError):
                    client.execute_command(*command)


def test_nobody_gets_in_without_a_password(tmp_path: Path) -> None:
    made, _ = cluster_secrets("somebody")
    with (
        running_store("embeddings", tmp_path, made) as port,
        redis.Redis(port=port) as stranger,
        pytest.raises(redis.AuthenticationError),
    ):
        stranger.get("ivl:something")
