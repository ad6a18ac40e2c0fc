"""A store run by the manifests' own configuration and users, on another port and in another folder."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import redis

from deploy.local.ports import free_port
from deploy.local.process import ChildProcess
from deploy.local.valkey import server_binary
from tests.deploy.manifests import KUSTOMIZE


@contextmanager
def running_store(name: str, folder: Path, made: Mapping[str, Mapping[str, str]]) -> Iterator[int]:
    """Run the store `name` (embeddings or conversations) with the users of the secrets `made`; yield its port."""
    users, data = folder / f"{name}.acl", folder / f"{name}-data"
    users.write_text(made[f"valkey-{name}-users"]["users.acl"])
    data.mkdir()
    port = free_port()
    text = (KUSTOMIZE / "base/valkey" / f"{name}.conf").read_text()
    for key, value in (("bind", "127.0.0.1"), ("port", port), ("dir", data), ("aclfile", users)):
        text, count = re.subn(rf"^{key} .*$", f"{key} {value}", text, flags=re.M)
        assert count == 1
    process = ChildProcess("valkey", [server_binary(), "-"], {}, folder / f"{name}.log", said=text)
    try:
        _wait_until_it_answers(port, process)
        yield port
    finally:
        process.kill()


def _wait_until_it_answers(port: int, process: ChildProcess) -> None:
    with redis.Redis(port=port) as stranger:
        while True:
            assert process.exit_code is None, process.last_lines()
            try:
                stranger.ping()
            except redis.AuthenticationError:
                return
            except redis.ConnectionError:
                continue
