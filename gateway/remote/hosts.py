"""The hosts that media may be fetched from, as the operator lists them."""

from collections.abc import Iterable, Sequence
from typing import Final, Self

from gateway.remote.url import HOST, HTTPS_PORT, RemoteUrl

ANY_HOST: Final = "*"
_SUBDOMAINS: Final = "*."


class HostList:
    """Names of hosts: `host`, `host:port`, `*.domain` for every host below a domain, `*` for all. Port 443 if none.

    Raises `ValueError`, fit to be shown to the operator, for an entry that is none of these.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        self._entries = tuple(_entry(text) for text in entries)

    @classmethod
    def parsed(cls, text: str) -> Self:
        """Return the list that is written with commas between the entries."""
        return cls(entry.strip() for entry in text.split(",") if entry.strip())

    @property
    def is_empty(self) -> bool:
        """Whether nothing is fetched from anywhere."""
        return not self._entries

    @property
    def allows_any(self) -> bool:
        """Whether `*` is among the entries."""
        return (ANY_HOST, HTTPS_PORT) in self._entries

    def allows(self, url: RemoteUrl) -> bool:
        """Whether the URL's host and port are on the list."""
        return any(port == url.port and name in _names_for(url.host) for name, port in self._entries)


def _entry(text: str) -> tuple[str, int]:
    name, separator, port = text.lower().partition(":")
    is_port = not separator or (port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16)
    if not is_port or not (name == ANY_HOST or HOST.fullmatch(name.removeprefix(_SUBDOMAINS))):
        raise ValueError("has to be host names with commas between them: host, host:port or *.domain; no addresses")
    if name == ANY_HOST and separator:
        raise ValueError("* takes no port")
    return name, int(port or HTTPS_PORT)


def _names_for(host: str) -> Sequence[str]:
    """Return every entry that lets `host` in: itself, each domain that it lies below, and all."""
    labels = host.split(".")
    domains = [".".join(labels[index:]) for index in range(1, len(labels))]
    return [host, *(f"{_SUBDOMAINS}{domain}" for domain in domains), ANY_HOST]
