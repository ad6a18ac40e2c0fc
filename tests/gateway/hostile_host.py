"""A host on the Internet that sends whatever a test wants, and what is needed to reach it on this machine."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from ipaddress import ip_address

import trustme

from gateway.remote import FetchLimits, HostList, RemoteMedia
from gateway.remote.addresses import Address
from gateway.remote.connection import Connector

NAME = "pictures.test"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(1000)
LOOPBACK = ip_address("127.0.0.1")
Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def answer(*headers: str, body: bytes = PNG, status: str = "200 OK") -> bytes:
    """An answer as it goes over the wire; its type and length are a picture's where no header says otherwise."""
    names = {header.partition(":")[0].lower() for header in headers}
    lines = [*headers]
    if "content-type" not in names:
        lines.append("Content-Type: image/png")
    if not names & {"content-length", "transfer-encoding"}:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode() + body


class OnlyThisMachine:
    """The address policy of a test: the hostile host may be reached, and nothing else."""

    def allows(self, address: Address) -> bool:
        return address == LOOPBACK


class Names:
    """A resolver with an answer per look-up; the last one stays. None: there is no such host."""

    def __init__(self, *answers: Sequence[str] | None) -> None:
        self.asked: list[str] = []
        self._answers = list(answers)

    async def addresses_of(self, host: str) -> Sequence[Address]:
        self.asked.append(host)
        found = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if found is None:
            raise OSError("a library's words")
        return [ip_address(address) for address in found]


class HostileHost:
    """Answers on loopback with what it is told to, under a certificate for `pictures.test`."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.requests: list[bytes] = []
        self.server_names: list[str] = []
        self.connections = 0
        self.script: Script | None = None
        self.sends = answer()
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        certificates()[0].configure_trust(self.tls)

    @property
    def url(self) -> str:
        return f"https://{NAME}:{self.port}/a/picture.png?size=1"

    def media(
        self,
        limits: FetchLimits | None = None,
        *,
        names: Names | None = None,
        hosts: str = "",
        trusted: ssl.SSLContext | None = None,
    ) -> RemoteMedia:
        """What fetches from this host, and by its rules from nowhere else."""
        connector = Connector(names or Names(["127.0.0.1"]), OnlyThisMachine(), trusted or self.tls, 5.0)
        return RemoteMedia(HostList.parsed(hosts or f"{NAME}:{self.port}"), connector, limits or FetchLimits())

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(self.sends)
            await writer.drain()
            if self.script is not None:
                await self.script(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the other side had enough
        finally:
            writer.close()


@cache
def certificates() -> tuple[trustme.CA, trustme.LeafCert]:
    """An authority that the tests trust, and its certificate for the host."""
    authority = trustme.CA()
    return authority, authority.issue_cert(NAME)


@asynccontextmanager
async def hostile_host() -> AsyncIterator[HostileHost]:
    """Serve until the context ends."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificates()[1].configure_cert(context)
    host: HostileHost | None = None

    def noted(_: ssl.SSLObject, name: str | None, __: ssl.SSLContext) -> None:
        assert host is not None
        host.server_names.append(name or "")

    context.sni_callback = noted  # type: ignore[assignment]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert host is not None
        await host.serve(reader, writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    host = HostileHost(server.sockets[0].getsockname()[1])
    try:
        yield host
    finally:
        server.close()
