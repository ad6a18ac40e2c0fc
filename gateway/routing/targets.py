"""Where the replicas of a stage are: addresses one by one, or a name that stands for all of them."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final

_BY_NAME: Final = "dns:///"
Lookup = Callable[[str, int], Awaitable[list[str]]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One replica: the gRPC target that reaches it, and the name that it was found under, where it was."""

    address: str
    name: str = ""


class Targets:
    """What a setting says: `host:port` is one replica, `dns:///name:port` is one for each address of the name.

    Several are separated by commas. What only gRPC can read (`unix:`, a DNS server of its own) is one replica.
    Raises `ValueError` for what nobody can read.
    """

    def __init__(self, text: str, lookup: Lookup | None = None) -> None:
        self._entries = [entry.strip() for entry in text.split(",")]
        for entry in self._entries:
            if not entry or (entry.startswith(_BY_NAME) and not all(_host_and_port(entry.removeprefix(_BY_NAME)))):
                raise ValueError("has to be host:port or dns:///name:port, or several of them joined by commas")
        self._lookup = lookup or _addresses_of

    @property
    def can_change(self) -> bool:
        """Whether it is worth while to resolve it again."""
        return any(entry.startswith(_BY_NAME) for entry in self._entries)

    async def resolve(self) -> tuple[Endpoint, ...]:
        """Return the replicas, each once. Raises `OSError` where a name cannot be resolved."""
        found = [endpoint for entry in self._entries for endpoint in await self._endpoints(entry)]
        return tuple({endpoint.address: endpoint for endpoint in found}.values())

    async def _endpoints(self, entry: str) -> Iterable[Endpoint]:
        if not entry.startswith(_BY_NAME):
            return [Endpoint(entry)]
        host, port = _host_and_port(entry.removeprefix(_BY_NAME))
        return [Endpoint(_joined(address, port), host) for address in await self._lookup(host, port)]


async def _addresses_of(host: str, port: int) -> list[str]:
    """Return the addresses of a name; of a machine that has both kinds, those of IPv4, so that none counts twice."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)  # in a thread
    families = {family for family, *_ in found}
    wanted = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
    return sorted({str(address[0]) for family, *_, address in found if family == wanted})


def _host_and_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port) if port.isdecimal() else 0


def _joined(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
