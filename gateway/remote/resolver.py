"""Finds the addresses of hosts."""

import asyncio
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from typing import Protocol

from gateway.remote.addresses import Address


class Resolver(Protocol):
    """Finds the addresses of hosts."""

    async def addresses_of(self, host: str) -> Sequence[Address]:
        """Return every address of `host`, best first; raise `OSError` where it has none."""


class SystemResolver:
    """Asks the operating system, on threads of its own: a name server that hangs holds up nothing else."""

    def __init__(self, parallel: int) -> None:
        self._threads = ThreadPoolExecutor(parallel, thread_name_prefix="resolver")

    async def addresses_of(self, host: str) -> Sequence[Address]:
        """Return every address of `host`, best first; raise `OSError` where it has none."""
        found = await asyncio.get_running_loop().run_in_executor(self._threads, _look_up, host)
        return [ip_address(address) for address in found]

    def close(self) -> None:
        """Take no more questions; nobody waits for those that are open."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _look_up(host: str) -> list[str]:
    return [str(place[0]) for *_, place in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
