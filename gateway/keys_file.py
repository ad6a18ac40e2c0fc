"""The file that the API keys are in: read at start, and looked at again and again while the gateway runs."""

import asyncio
from pathlib import Path
from typing import NoReturn

import structlog

from gateway.keys import KeyRing, KeysDocument, KeysFileInvalid

log = structlog.get_logger()


def read_keys_file(path: Path) -> KeysDocument:
    """Return what the file says; raise `KeysFileInvalid`, also where it cannot be read."""
    return KeysDocument.parsed(_content(path))


class FollowedKeys:
    """A key ring that goes by a file. A file that cannot be used is logged, and the keys stay as they are.

    The content is compared and no date of the file: Kubernetes changes a mounted secret by turning a link.
    """

    def __init__(self, path: Path) -> None:
        """Read the file; raise `KeysFileInvalid`."""
        self._path = path
        self._problem = ""
        self._seen = _content(path)
        document = KeysDocument.parsed(self._seen)
        self.ring = KeyRing(document)
        _log_read(document)

    async def follow(self, every_s: float) -> NoReturn:
        """Look at the file every `every_s` seconds, until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            await self.refresh()

    async def refresh(self) -> None:
        """Go by what the file says now, if that can be used."""
        try:
            content = await asyncio.to_thread(_content, self._path)
            if content == self._seen:
                self._problem = ""
                return
            document = KeysDocument.parsed(content)
        except KeysFileInvalid as error:
            self._reject(str(error))
            return
        self._seen, self._problem = content, ""
        self.ring.replace(document)
        _log_read(document)

    def _reject(self, problem: str) -> None:
        """Log what is wrong with the file, once."""
        if problem != self._problem:
            log.error("keys_file_rejected", problem=problem)
        self._problem = problem


def _log_read(document: KeysDocument) -> None:
    keys = sum(len(tenant.keys) for tenant in document.tenants)
    log.info("keys_file_read", tenants=len(document.tenants), keys=keys)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise KeysFileInvalid(f"cannot be read: {error.strerror}") from None
