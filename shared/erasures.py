"""Erasure of embeddings: from the store, and from the memory of every process that listens.

Whoever erases removes the stored values first and announces it then: what a process still reads meanwhile it was
already reading, and a process drops what it was reading when it hears of an erasure.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, Protocol, TypeVar, cast

import structlog

from shared.announcements import Announcements
from shared.errors import StoreUnavailable
from shared.redis_link import RedisLink, StoreFailed
from shared.stored_name import keys_of, name_of
from shared.tasks import cancelled

log = structlog.get_logger()
T = TypeVar("T")
CHANNEL: Final = "ivl:erased"
_KEYS_AT_ONCE: Final = 1000


class Memory(Protocol):
    """Something in this process that holds embeddings."""

    def erase_tagged(self, tenant_tag: str, media_digest: str | None) -> object:
        """Forget a tenant's embeddings of one medium, None: of all its media."""

    def clear(self) -> None:
        """Forget everything."""


class Erasures:
    """Carries announced erasures to this process's memories.

    `hear` is to be called with every message on `CHANNEL`, and `connected` whenever listening begins or begins again:
    what was announced before may have been missed, so everything is forgotten.
    """

    def __init__(self, *memories: Memory) -> None:
        self._memories = memories

    def connected(self) -> None:
        """Forget everything."""
        for memory in self._memories:
            memory.clear()

    def hear(self, message: bytes) -> None:
        """Forget what a message names; a message that names nothing well makes everything be forgotten."""
        try:
            announced = json.loads(message)
            tenant_tag, media_digest = announced["tenant_tag"], announced["media_digest"]
        except (ValueError, TypeError, KeyError):
            log.warning("erasure_unreadable")
            self.connected()
            return
        for memory in self._memories:
            memory.erase_tagged(tenant_tag, media_digest or None)


@asynccontextmanager
async def heeding_erasures(link: RedisLink, *memories: Memory) -> AsyncIterator[None]:
    """Carry erasures to the memories, over a connection of its own, for as long as the context lasts."""
    erasures = Erasures(*memories)
    heard = Announcements(link.redis, {CHANNEL: erasures.hear}, erasures.connected)
    listening = asyncio.create_task(heard.run())
    try:
        yield
    finally:
        await cancelled(listening)


async def erase_stored(link: RedisLink, tenant_tag: str, media_digest: str | None) -> int:
    """Remove stored embeddings and announce it; return how many there were. Raises `StoreUnavailable`."""
    removed = 0
    async for keys in scan(link, keys_of(tenant_tag, media_digest)):
        manifests = [key for key in keys if name_of(key)]
        removed += await _unlink(link, manifests)
        await _unlink(link, [key for key in keys if not name_of(key)])
    message = json.dumps({"tenant_tag": tenant_tag, "media_digest": media_digest})
    await _insist(link, "publish", lambda: link.redis.publish(CHANNEL, message))
    log.info("embeddings_erased", embeddings=removed)
    return removed


async def scan(link: RedisLink, pattern: str) -> AsyncIterator[list[bytes]]:
    """Yield the keys that match, some at a time; one can come twice. Raises `StoreUnavailable`."""
    cursor = 0
    while True:
        command = partial(link.redis.scan, cursor, match=pattern, count=_KEYS_AT_ONCE)
        cursor, keys = await _insist(link, "scan", command)
        yield cast(list[bytes], keys)
        if not cursor:
            return


async def _unlink(link: RedisLink, keys: list[bytes]) -> int:
    return await _insist(link, "unlink", lambda: link.redis.unlink(*keys)) if keys else 0


async def _insist(link: RedisLink, name: str, command: Callable[[], Awaitable[T]]) -> T:
    try:
        return await link.attempt(name, command)
    except StoreFailed:
        raise StoreUnavailable("The embedding store cannot be reached; try again.", retry_after_s=1.0) from None
