"""Lets calls in that show an API key, each as the tenant whose key it is."""

from collections.abc import Iterable
from typing import Final

from gateway.caller import Caller, admit
from gateway.keys import KeyRing
from shared.errors import NotPermitted

_FOR_OPERATORS: Final = "/internvl_serving.gateway.v1.SystemService/"


class KeyGate:
    """The gate of the gateway's server: called with every call's method and metadata, in the call's own task."""

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys

    def __call__(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """Let the call in as its tenant; raise `ApiKeyInvalid` or `NotPermitted`."""
        caller = self._keys.verify(presented_key(metadata))
        admit(caller)
        if method.startswith(_FOR_OPERATORS):
            check_operator(caller)


def check_operator(caller: Caller) -> None:
    """Raise `NotPermitted` for a tenant that may not see how the whole system is."""
    if caller.tenant and not caller.is_operator:
        raise NotPermitted("This is for the keys of operators.")


def presented_key(pairs: Iterable[tuple[str, str | bytes]]) -> str | None:
    """Return the key that a call shows, in gRPC's metadata or in HTTP's headers, which are named in lower case.

    `authorization: Bearer KEY` comes before `x-api-key: KEY`. Where either comes twice, none is shown: what stands in
    between may have read the other.
    """
    shown: dict[str, list[str]] = {"authorization": [], "x-api-key": []}
    for name, value in pairs:
        if name in shown and isinstance(value, str):
            shown[name].append(value)
    if any(len(values) > 1 for values in shown.values()):
        return None
    for value in shown["authorization"]:
        scheme, _, key = value.partition(" ")
        if scheme.lower() == "bearer":
            return key.strip()
    return next(iter(shown["x-api-key"]), None)
