"""The order in which replicas are asked for what a key names: the same for all who know the same replicas.

Each replica draws a number from the key and its own address, and the highest comes first. A replica that comes or goes
therefore moves the keys that it is first for, and no others.
"""

from collections.abc import Iterable
from hashlib import blake2b


def ranked(key: str, addresses: Iterable[str]) -> list[str]:
    """Return the addresses, first choice first."""
    return sorted(addresses, key=lambda address: _drawn(key, address), reverse=True)


def _drawn(key: str, address: str) -> bytes:
    return blake2b(f"{address}\n{key}".encode(), digest_size=8).digest()
