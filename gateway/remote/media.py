"""Media behind URLs: fetched only where the operator allows it, and only as far as the limits go."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import structlog

from gateway.remote.addresses import PublicAddresses
from gateway.remote.connection import Connector, public_tls
from gateway.remote.download import download
from gateway.remote.fetch_metrics import UNCOUNTED, FetchMetrics
from gateway.remote.hosts import HostList
from gateway.remote.limits import FetchLimits
from gateway.remote.refusals import Outcome, Refused, not_allowed, too_slow
from gateway.remote.resolver import SystemResolver
from gateway.remote.url import parse_url
from shared.errors import QueueFull, RemoteUrlRefused

log = structlog.get_logger()
_RETRY_S: Final = 1.0


class RemoteMedia:
    """Fetches media from the hosts that are listed; without a connector from nowhere. Safe to share between calls.

    Nothing is remembered: the bytes take the path of bytes that came with the request, and the same URL may lead to
    something else tomorrow.
    """

    def __init__(
        self,
        hosts: HostList,
        connector: Connector | None,
        limits: FetchLimits | None = None,
        metrics: FetchMetrics = UNCOUNTED,
    ) -> None:
        self._hosts = hosts
        self._connector = connector
        self._limits = limits or FetchLimits()
        self._metrics = metrics
        self._room = asyncio.Semaphore(self._limits.parallel)
        self._waiting = 0

    async def fetch(self, url: str, field: str) -> bytes:
        """Return the bytes behind `url`, which came in the request's `field`.

        Raises `RemoteUrlRefused` for whatever is not fetched, `QueueFull` where too many wait to be.
        """
        started = time.monotonic()
        try:
            content = await self._fetched(url)
        except Refused as refused:
            self._metrics.fetches.inc(outcome=refused.outcome.value)
            # Not the URL: it may hold a signature, and its host may be the attacker's message.
            log.info("remote_media_refused", outcome=refused.outcome.value, detail=refused.detail)
            raise RemoteUrlRefused(refused.message, field=field) from refused
        self._metrics.fetches.inc(outcome=Outcome.FETCHED.value)
        self._metrics.fetched_bytes.inc(len(content))
        log.info("remote_media_fetched", size_bytes=len(content), duration_ms=_ms(time.monotonic() - started))
        return content

    async def _fetched(self, text: str) -> bytes:
        if self._connector is None:
            raise not_allowed(
                "This server fetches no URLs; send the bytes, as a data: URL or uploaded.", "switched off"
            )
        url = parse_url(text)
        if not self._hosts.allows(url):
            raise not_allowed("This server does not fetch from this host; send the bytes.", "host not listed")
        async with self._admitted():
            try:
                async with asyncio.timeout(self._limits.timeout_s), self._connector.connected(url) as streams:
                    return await download(streams, url, self._limits)
            except TimeoutError as error:
                raise too_slow("past the time limit") from error

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[None]:
        """Hold one of the places for fetches; raise `QueueFull` where too many wait for one."""
        if self._room.locked() and self._waiting >= self._limits.waiting:
            self._metrics.fetches.inc(outcome=Outcome.QUEUE_FULL.value)
            raise QueueFull("Too many URLs wait to be fetched.", retry_after_s=_RETRY_S)
        self._waiting += 1
        try:
            await self._room.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._room.release()


@contextmanager
def opened_remote_media(
    hosts: HostList, limits: FetchLimits, metrics: FetchMetrics = UNCOUNTED
) -> Iterator[RemoteMedia]:
    """Yield what fetches from `hosts` over the Internet, and from nowhere where the list is empty."""
    if hosts.is_empty:
        yield RemoteMedia(hosts, None, limits, metrics)
        return
    resolver = SystemResolver(limits.parallel)
    try:
        connector = Connector(resolver, PublicAddresses(), public_tls(), limits.connect_timeout_s)
        yield RemoteMedia(hosts, connector, limits, metrics)
    finally:
        resolver.close()


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 1)
