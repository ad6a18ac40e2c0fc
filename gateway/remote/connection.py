"""Connects to the host of a URL: looked up once, every address checked, and connected to by its number."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final, TypeAlias

from gateway.remote.addresses import Address, AddressPolicy
from gateway.remote.refusals import unreachable
from gateway.remote.resolver import Resolver
from gateway.remote.url import RemoteUrl

Streams: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]
_MAX_ATTEMPTS: Final = 3


def public_tls() -> ssl.SSLContext:
    """Return what is asked of a host: a certificate for its name by an authority that this system trusts."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


class Connector:
    """Opens connections to hosts all of whose addresses are allowed."""

    def __init__(
        self, resolver: Resolver, addresses: AddressPolicy, tls: ssl.SSLContext, connect_timeout_s: float
    ) -> None:
        self._resolver = resolver
        self._addresses = addresses
        self._tls = tls
        self._connect_timeout_s = connect_timeout_s

    @asynccontextmanager
    async def connected(self, url: RemoteUrl) -> AsyncIterator[Streams]:
        """Yield a connection to the URL's host; raise `Refused` where there is no way that is allowed."""
        reader, writer = await self._first_open(url, await self._checked_addresses(url.host))
        try:
            yield reader, writer
        finally:
            writer.transport.abort()  # closing in order would wait for the other side

    async def _checked_addresses(self, host: str) -> Sequence[Address]:
        """Look the host up. This is the only look-up: who answers differently the next time is not asked again."""
        try:
            found = await self._resolver.addresses_of(host)
        except (OSError, UnicodeError) as error:
            raise unreachable("not resolved") from error
        # Every one: a name with a public and a private address is somebody's attempt, or somebody's mistake.
        if not found or not all(self._addresses.allows(address) for address in found):
            raise unreachable("address not allowed" if found else "not resolved")
        return found

    async def _first_open(self, url: RemoteUrl, addresses: Sequence[Address]) -> Streams:
        detail = "not connected"
        for address in addresses[:_MAX_ATTEMPTS]:
            try:
                async with asyncio.timeout(self._connect_timeout_s):
                    # A number is not looked up again; the name goes into SNI and is what the certificate is for.
                    return await asyncio.open_connection(
                        str(address), url.port, ssl=self._tls, server_hostname=url.host
                    )
            except ssl.SSLError:
                detail = "no TLS"
            except (OSError, UnicodeError):  # TimeoutError is one of them
                continue
        raise unreachable(detail)
