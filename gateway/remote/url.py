"""The one reading of a URL: what is checked, connected to and asked for are parts of the same match."""

import re
from dataclasses import dataclass
from typing import Final

from gateway.remote.refusals import not_allowed

HTTPS_PORT: Final = 443
_MAX_URL_CHARS: Final = 4096
# Far less than the standards allow, so that no two programs could read it differently: no user, no backslash, nothing
# outside ASCII, and no host that could be an address in any notation (a last label begins with a letter).
_LABEL: Final = "[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_LAST_LABEL: Final = "[a-z](?:[a-z0-9-]{0,61}[a-z0-9])"
HOST: Final = re.compile(rf"(?:{_LABEL}\.)*{_LAST_LABEL}", re.ASCII | re.IGNORECASE)
_URL: Final = re.compile(
    rf"https://(?P<host>{HOST.pattern})(?::(?P<port>[1-9][0-9]{{0,4}}))?"
    r"(?P<path>/[\w\-.~!$&'()*+,;=:@%/\[\]]*)?(?P<query>\?[\w\-.~!$&'()*+,;=:@%/?\[\]]*)?(?:#[\w\-.~!$&'()*+,;=:@%/?]*)?",
    re.ASCII | re.IGNORECASE,
)
_MAX_HOST_CHARS: Final = 253
_MAX_PORT: Final = 65_535


@dataclass(frozen=True, slots=True)
class RemoteUrl:
    """An https URL. `host` is in lower case, `target` is the path and the query as they are asked for."""

    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        """What the Host header says."""
        return self.host if self.port == HTTPS_PORT else f"{self.host}:{self.port}"


def parse_url(text: str) -> RemoteUrl:
    """Return the URL; raise `Refused` for everything that is not plainly `https://host/path`."""
    match = _URL.fullmatch(text) if len(text) <= _MAX_URL_CHARS else None
    if match is None:
        raise not_allowed("Only plain URLs of the form https://host/path are fetched.", "not a plain URL")
    host, port = match["host"].lower(), int(match["port"] or HTTPS_PORT)
    if len(host) > _MAX_HOST_CHARS or port > _MAX_PORT:
        raise not_allowed("Only plain URLs of the form https://host/path are fetched.", "not a plain URL")
    return RemoteUrl(host, port, (match["path"] or "/") + (match["query"] or ""))
