"""API keys: who may call, as which tenant, and how much. `python -m gateway.keys new --tenant NAME` makes one."""

import argparse
import hashlib
import hmac
import json
import math
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Final, NamedTuple, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from gateway.caller import ANYBODY, Caller
from shared.errors import ApiKeyInvalid

KEY_PREFIX: Final = "ivl_"  # so that a key which got somewhere it should not be can be searched for
_KEY_BYTES: Final = 32
_NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9._-]{0,62}$"

Name = Annotated[str, Field(pattern=_NAME_PATTERN)]
Limit = Annotated[int | None, Field(ge=1)]


class KeysFileInvalid(ValueError):
    """The keys file cannot be used; the message says where and why, without what stands there."""


class _Entry(BaseModel):
    # What is misspelt must not be taken for absent: a limit that nobody reads limits nobody.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class TenantLimits(_Entry):
    """How much a tenant may ask for; None: as much as there is room for."""

    requests_per_minute: Limit = None
    concurrent_requests: Limit = None
    tiles_per_minute: Limit = None
    tokens_per_minute: Limit = None


class KeyEntry(_Entry):
    """One key of a tenant: a name for logs, the SHA-256 of the key, and when it ends."""

    name: Name
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    expires: AwareDatetime | None = None


class TenantEntry(_Entry):
    """A tenant. `isolated`: it shares no embeddings either, so that no time it takes tells of others' pictures.

    `operator`: it may see how the whole system is, and what it counts.
    """

    name: Name
    keys: tuple[KeyEntry, ...] = ()
    isolated: bool = False
    operator: bool = False
    limits: TenantLimits = TenantLimits()

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        _check_distinct("two keys of a tenant have the same name", [key.name for key in self.keys])
        return self


class KeysDocument(_Entry):
    """Everything that a keys file says."""

    tenants: tuple[TenantEntry, ...]

    @classmethod
    def parsed(cls, content: bytes) -> Self:
        """Return what the file's content says; raise `KeysFileInvalid`."""
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise KeysFileInvalid(f"{place}: {first['msg']}" if place else first["msg"]) from None

    @model_validator(mode="after")
    def _check_tenants(self) -> Self:
        _check_distinct("two tenants have the same name", [tenant.name for tenant in self.tenants])
        _check_distinct("a key is listed twice", [key.sha256 for tenant in self.tenants for key in tenant.keys])
        return self


class _Known(NamedTuple):
    """A key that lets in, until `end_time` in seconds since the epoch."""

    digest: bytes
    end_time: float
    caller: Caller


class KeyRing:
    """Knows who may call. Without a document everybody may, and nobody is told apart.

    `clock` is the time of day in seconds. One event loop only; nothing waits.
    """

    def __init__(self, document: KeysDocument | None = None, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._is_open = document is None
        self._known: tuple[_Known, ...] = ()
        self._limits: dict[str, TenantLimits] = {}
        if document is not None:
            self.replace(document)

    @property
    def is_open(self) -> bool:
        """Whether nobody has to show a key."""
        return self._is_open

    def replace(self, document: KeysDocument) -> None:
        """Go by another document from the next call on. What is running goes on."""
        self._is_open = False
        self._limits = {tenant.name: tenant.limits for tenant in document.tenants}
        self._known = tuple(_known(tenant, key) for tenant in document.tenants for key in tenant.keys)

    def verify(self, presented: str | None) -> Caller:
        """Return whose key it is; raise `ApiKeyInvalid`, the same for every reason. Takes as long for every key."""
        if self._is_open:
            return ANYBODY
        digest = hashlib.sha256((presented or "").encode(errors="replace")).digest()
        found: Caller | None = None
        for known in self._known:
            # Every hash is compared, to its end: how long it takes tells nothing of what is stored.
            is_same = hmac.compare_digest(known.digest, digest)
            found = known.caller if is_same and self._clock() < known.end_time else found
        if found is None:
            raise ApiKeyInvalid("This server answers those who show a valid API key.")
        return found

    def limits_of(self, tenant: str) -> TenantLimits:
        """Return how much the tenant may ask for; one that is not in the document has no limits of its own."""
        return self._limits.get(tenant, TenantLimits())


def _known(tenant: TenantEntry, key: KeyEntry) -> _Known:
    end_time = key.expires.timestamp() if key.expires else math.inf
    caller = Caller(tenant.name, key.name, is_isolated=tenant.isolated, is_operator=tenant.operator)
    return _Known(bytes.fromhex(key.sha256), end_time, caller)


def new_key() -> str:
    """Return a key that nobody has, 32 random bytes."""
    return KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def hash_of(key: str) -> str:
    """Return what a keys file has of a key. A plain hash is enough: nobody can try all of 256 random bits."""
    return hashlib.sha256(key.encode()).hexdigest()


def _check_distinct(problem: str, values: Iterable[str]) -> None:
    listed = list(values)
    if len(set(listed)) < len(listed):
        raise ValueError(problem)


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m gateway.keys", description="API keys of the gateway.")
    commands = parser.add_subparsers(required=True)
    new = commands.add_parser("new", help="print a new key, this once, and its entry for the keys file")
    new.add_argument("--tenant", required=True, help="whose key it is")
    new.add_argument("--name", default="default", help="what logs call the key (%(default)s)")
    chosen = parser.parse_args(arguments)
    key = new_key()
    entry = {"name": chosen.tenant, "keys": [{"name": chosen.name, "sha256": hash_of(key)}]}
    try:
        KeysDocument.parsed(json.dumps({"tenants": [entry]}).encode())
    except KeysFileInvalid as error:
        parser.error(str(error))
    sys.stdout.write(f"{key}\n\n{json.dumps(entry, indent=2)}\n")


if __name__ == "__main__":
    _main()
