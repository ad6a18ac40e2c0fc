"""How a client proves who it is and makes sure whom it talks to: API keys and TLS."""

import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Final, Self

import grpc

from internvl_client.channel import BLOCKING_OPTIONS, CHANNEL_OPTIONS

_KEY: Final = re.compile(r"[!-~]{1,1024}")
_SCHEME: Final = re.compile(r"^(dns:(//[^/]*)?/?/?|ipv4:|ipv6:|passthrough:(///)?)")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for TLS.

    `ca` holds who has to have signed the gateway's certificate; None: one of the authorities that grpcio knows. `cert`
    and `key` are the client's own, for gateways that ask for them: both or neither. `server_name` is the name that the
    gateway's certificate has to bear; empty: the host of the address.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None
    server_name: str = ""

    def credentials(self) -> grpc.ChannelCredentials:
        """Return what a channel is opened with.

        Raises `OSError` for a file that cannot be read, and `ValueError` for one that holds something else.
        """
        if bool(self.cert) != bool(self.key):
            raise ValueError("A certificate goes with its key: give both or neither.")
        ca, cert, key = (Path(file).read_bytes() if file else None for file in (self.ca, self.cert, self.key))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.ca:
            _check(
                lambda: context.load_verify_locations(str(self.ca)), f"{self.ca} holds no certificate in PEM format."
            )
        if self.cert:
            # Without a password of ours, OpenSSL would ask for one at the terminal.
            _check(
                lambda: context.load_cert_chain(str(self.cert), str(self.key), password=lambda: b""),
                f"{self.cert} and {self.key} are not a certificate and its key, in PEM format and not encrypted.",
            )
        return grpc.ssl_channel_credentials(ca, key, cert)


@dataclass(frozen=True, slots=True)
class Access:
    """What opens a channel, and what goes with every call over it. Without `credentials` it is plaintext."""

    credentials: grpc.ChannelCredentials | None
    options: tuple[tuple[str, str | int], ...]
    metadata: tuple[tuple[str, str], ...] = field(repr=False)

    @classmethod
    def to(
        cls,
        address: str,
        *,
        api_key: str | None = None,
        tls: bool | TlsFiles = False,
        insecure: bool = False,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> Self:
        """Return how to reach a gateway; see `Client` for the arguments, and for what is raised."""
        files = TlsFiles() if tls is True else tls or None
        if files and credentials:
            raise ValueError("Give tls or credentials, not both.")
        if files:
            credentials = files.credentials()
        if api_key and not _KEY.fullmatch(api_key):
            raise ValueError("An API key is printable ASCII without spaces.")
        if api_key and credentials is None and not (insecure or is_loopback(address)):
            raise ValueError(
                f"The API key would travel to {address} unencrypted, for anybody on the way to read: use TLS, or say "
                "that the way is safe (insecure)."
            )
        named = (("grpc.ssl_target_name_override", files.server_name),) if files and files.server_name else ()
        metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        return cls(credentials, (*CHANNEL_OPTIONS, *named), metadata)

    def channel(self, address: str) -> grpc.Channel:
        """Return a blocking channel."""
        options = (*self.options, *BLOCKING_OPTIONS)
        if self.credentials is None:
            return grpc.insecure_channel(address, options=options)
        return grpc.secure_channel(address, self.credentials, options=options)

    def aio_channel(self, address: str) -> grpc.aio.Channel:
        """Return an asyncio channel."""
        if self.credentials is None:
            return grpc.aio.insecure_channel(address, options=self.options)
        return grpc.aio.secure_channel(address, self.credentials, options=self.options)


def is_loopback(address: str) -> bool:
    """Return whether what is sent to a gRPC address stays on this machine; False where that is not certain."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    target = _SCHEME.sub("", address)
    host = target.rpartition(":")[0] if re.search(r":\d+$", target) else target
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _check(load: Callable[[], object], complaint: str) -> None:
    try:
        load()
    except ssl.SSLError:
        raise ValueError(complaint) from None
