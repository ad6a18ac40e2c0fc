"""Throwaway authorities and certificates, as files."""

from dataclasses import dataclass, field
from pathlib import Path

import trustme

from shared.tls_files import TlsFiles

HOSTS = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Authority:
    """An authority that writes certificates below `directory`."""

    directory: Path
    ca: trustme.CA = field(default_factory=trustme.CA)

    def __post_init__(self) -> None:
        self.directory.mkdir(exist_ok=True)
        self.ca.cert_pem.write_to_path(self.ca_file)

    @property
    def ca_file(self) -> Path:
        return self.directory / "ca.pem"

    def issue(self, name: str, *hosts: str, file: str = "") -> TlsFiles:
        """Write a certificate for `hosts` with a common name; `file` is what its files are called, if not that."""
        issued = self.ca.issue_cert(*(hosts or HOSTS), common_name=name)
        cert_file, key_file = (self.directory / f"{file or name}{ending}" for ending in ("-cert.pem", "-key.pem"))
        # Not appended: trustme's own way to write a chain would leave an earlier one's end.
        cert_file.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key_file)
        return TlsFiles(self.ca_file, cert_file, key_file)
