"""Makes the secrets that the manifests refer to: `python -m deploy.kustomize.cluster_secrets | kubectl apply -f -`.

All are drawn anew. The API key that it makes is printed once, to standard error; what is stored of it is a hash.
"""

import argparse
import base64
import hashlib
import json
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gateway.keys import hash_of, new_key

_NAMESPACE = "internvl"
# What the services ask of their stores, and no more: no scripts, no configuration, no keys of others.
_CONNECTING = "+hello +auth +ping +select +client|setinfo +client|setname +info"
_TALKING = "+subscribe +unsubscribe +publish"
_HOLDING = "+watch +unwatch +multi +exec +discard"
_EMBEDDING_COMMANDS = (
    f"{_CONNECTING} {_TALKING} {_HOLDING} "
    "+get +mget +set +setex +exists +del +unlink +expire +pexpire +pttl +scan +strlen"
)
_CONVERSATION_COMMANDS = (
    f"{_CONNECTING} {_TALKING} {_HOLDING} "
    "+get +mget +set +exists +del +unlink +expire +pexpire +pttl "
    "+hget +hmget +hgetall +hset +hkeys +hlen +hexists +hincrby +hdel +rpush +lrange +llen "
    "+zadd +zrem +zrange +zrevrange +zcard +zscore +zremrangebyscore +zremrangebyrank"
)


@dataclass(frozen=True, slots=True)
class StoreUser:
    """A user of a store, with the password that only it has."""

    name: str
    password: str
    commands: str

    def rule(self) -> str:
        """Return the line of the store's users file; it holds a hash of the password."""
        digest = hashlib.sha256(self.password.encode()).hexdigest()
        return f"user {self.name} on #{digest} resetkeys ~ivl:* resetchannels &ivl:* -@all {self.commands}"

    def url(self, host: str) -> str:
        """Return the URL under which the store lets this user in."""
        return f"redis://{self.name}:{self.password}@{host}:6379/0"


def cluster_secrets(tenant: str) -> tuple[dict[str, dict[str, str]], str]:
    """Return the files of each secret by its name, and the API key of a first tenant."""
    vision, llm, gateway = (
        StoreUser(name, secrets.token_hex(32), commands)
        for name, commands in (
            ("vision", _EMBEDDING_COMMANDS),
            ("llm", _EMBEDDING_COMMANDS),
            ("gateway", _CONVERSATION_COMMANDS),
        )
    )
    embedding_key = secrets.token_hex(32)
    api_key = new_key()
    keys = {"tenants": [{"name": tenant, "keys": [{"name": "first", "sha256": hash_of(api_key)}]}]}
    return {
        "gateway-secrets": {"gateway_redis_url": gateway.url("valkey-conversations")},
        "vision-secrets": {
            "vision_redis_url": vision.url("valkey-embeddings"),
            "vision_embedding_key": embedding_key,
        },
        "llm-secrets": {"llm_redis_url": llm.url("valkey-embeddings"), "llm_embedding_key": embedding_key},
        "gateway-keys": {"keys.json": json.dumps(keys, indent=2)},
        "valkey-embeddings-users": {"users.acl": _users(vision, llm)},
        "valkey-conversations-users": {"users.acl": _users(gateway)},
    }, api_key


def manifest(files_by_secret: Mapping[str, Mapping[str, str]], namespace: str) -> dict[str, Any]:
    """Return the secrets as one list for kubectl."""
    items = [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "Opaque",
            "metadata": {"name": name, "namespace": namespace},
            "data": {file: base64.b64encode(text.encode()).decode() for file, text in files.items()},
        }
        for name, files in files_by_secret.items()
    ]
    return {"apiVersion": "v1", "kind": "List", "items": items}


def _users(*users: StoreUser) -> str:
    return "\n".join(["user default off", *(user.rule() for user in users)]) + "\n"


def main() -> int:
    """Print the list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tenant", default="default", help="who gets the first API key (default: default)")
    parser.add_argument("--namespace", default=_NAMESPACE, help=f"where the secrets go (default: {_NAMESPACE})")
    chosen = parser.parse_args()
    made, api_key = cluster_secrets(chosen.tenant)
    json.dump(manifest(made, chosen.namespace), sys.stdout, indent=1)
    sys.stderr.write(f"The API key of {chosen.tenant}, shown only now: {api_key}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
