"""Files of certificates and keys: read and checked together, and read again when they have changed."""

import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog

log = structlog.get_logger()
_ATTEMPTS: Final = 3  # to read files that are being replaced
_LOOK_EVERY_S: Final = 10.0


class TlsError(OSError):
    """A certificate, its key or an authority cannot be used; the message names the file."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The PEM files of one side of connections.

    `ca_file` holds who may have signed the other side's certificate; None: a client takes the roots that grpcio brings,
    a server asks for no certificate. `cert_file` (with what leads up to the authority, if anything does) and `key_file`
    are this side's own; a client may have neither. `peer_name` is the name that the other side's certificate has to
    bear; empty: the host that is called.
    """

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    peer_name: str = ""

    def read(self, known: "TlsContent | None" = None) -> "TlsContent":
        """Return what the files hold, which is `known` where nothing has changed.

        Raises `TlsError` where it cannot be used; what is known is not checked again.
        """
        for _ in range(_ATTEMPTS):
            content = self._content()
            if content == known:
                return known
            self._check()
            # What was checked are the files, because nothing in the standard library checks bytes.
            if content == self._content():
                return content
        raise TlsError(f"{self.cert_file or self.ca_file}: changes all the time.")

    def _content(self) -> "TlsContent":
        return TlsContent(*(_bytes_of(file) for file in (self.ca_file, self.cert_file, self.key_file)))

    def _check(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.ca_file:
            try:
                context.load_verify_locations(self.ca_file)
            except ssl.SSLError:
                raise TlsError(f"{self.ca_file}: holds no certificate of an authority in PEM format.") from None
        if self.cert_file:
            try:
                # Without a password of ours, OpenSSL would ask for one at the terminal.
                context.load_cert_chain(self.cert_file, self.key_file, password=lambda: b"")
            except ssl.SSLError:
                raise TlsError(
                    f"{self.cert_file} and {self.key_file}: are not a certificate and its key, both in PEM format and "
                    "the key not encrypted."
                ) from None


@dataclass(frozen=True, slots=True)
class TlsContent:
    """What `TlsFiles` hold."""

    ca: bytes | None
    cert_chain: bytes | None
    key: bytes | None = field(repr=False)


class WatchedTls:
    """What the files hold, for as long as they are replaced now and then. Safe to share between threads.

    They are looked at when somebody asks, every `look_every_s` at most. Making one raises `TlsError`; afterwards, what
    cannot be used is logged once, and what was read before stays.
    """

    def __init__(self, files: TlsFiles, look_every_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.files = files
        self._look_every_s, self._clock = look_every_s, clock
        self._lock = threading.Lock()
        self._refusal = ""
        self._content = files.read()
        self._look_at = clock() + look_every_s

    @property
    def content(self) -> TlsContent:
        """What the files hold; the same object until they hold something else."""
        with self._lock:
            if (now := self._clock()) >= self._look_at:
                self._look_at = now + self._look_every_s
                self._look()
            return self._content

    def _look(self) -> None:
        try:
            content = self.files.read(self._content)
        except TlsError as error:
            if str(error) != self._refusal:
                self._refusal = str(error)
                log.error("certificate_refused", why=self._refusal)
            return
        self._refusal = ""
        if content is not self._content:
            self._content = content
            log.info("certificate_renewed", file=str(self.files.cert_file or self.files.ca_file))


def watched(files: TlsFiles | None) -> WatchedTls | None:
    """Return what many channels share, if there is something; raise `TlsError`."""
    return WatchedTls(files, _LOOK_EVERY_S) if files else None


def _bytes_of(file: Path | None) -> bytes | None:
    if file is None:
        return None
    try:
        return file.read_bytes()
    except OSError as error:
        raise TlsError(f"{file}: cannot be read: {error.strerror}.") from None
