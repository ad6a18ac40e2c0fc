"""The other replicas: which of them encodes what, so that a medium is encoded once wherever it is asked for.

A replica that encodes holds a lease in Redis and renews it; the others wait for its announcement, and look for
themselves from time to time. A lease that is not renewed runs out, so a replica that died or froze holds nobody up for
longer than that. Where Redis cannot be reached every replica may encode everything.
"""

import asyncio
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Final, Protocol

import structlog

from shared.errors import ServiceError, StoreUnavailable
from shared.hold import Hold
from shared.patience import Patience
from shared.redis_link import RedisLink
from vision_service.metrics import UNOBSERVED, VisionMetrics
from vision_service.refusals import is_refusal, refusal_of

log = structlog.get_logger()
CHANNEL: Final = "ivl:encoded"
_RENEWALS: Final = 3  # of a lease within its time


class Lease(Protocol):
    """The right to encode one medium. Neither method raises."""

    async def finish(self, refusal: ServiceError | None = None) -> None:
        """Give the right back and tell those who wait: the embedding is stored, or why there will be none."""


class Watch(Protocol):
    """Waits for another replica's encode."""

    async def news(self) -> None:
        """Return when the other replica has announced something, or when it is time to look again.

        Raises what is wrong with the medium, if that was announced.
        """


class Fleet(Protocol):
    """The replicas of the vision service, this one included. Nothing but what is said here is raised."""

    async def is_encoding(self, digest: str, patience: Patience) -> bool:
        """Return whether a replica holds the lease of an embedding."""

    async def take(self, digest: str, patience: Patience) -> Lease | None:
        """Return the lease, renewed until it is given back; None: another replica holds it."""

    def watch(self, digest: str) -> AbstractContextManager[Watch]:
        """Return a context in which another replica's encode is waited for."""


class NoFleet:
    """A service without a store: there is one replica."""

    async def is_encoding(self, digest: str, patience: Patience) -> bool:
        """Return False: this replica knows what it encodes itself."""
        return False

    async def take(self, digest: str, patience: Patience) -> Lease | None:
        """Return a lease of nothing."""
        return _NoLease()

    def hear(self, message: bytes) -> None:
        """Nobody announces anything."""

    def watch(self, digest: str) -> AbstractContextManager[Watch]:
        """Never used: nobody else encodes."""
        raise AssertionError("there is no other replica")


class RedisFleet:
    """Leases in Redis under `ivl:encoding:<digest>`. `hear` has to be called with every message on `CHANNEL`."""

    def __init__(
        self, link: RedisLink, lease_s: float, poll_s: float = 0.5, metrics: VisionMetrics = UNOBSERVED
    ) -> None:
        self._link = link
        self._metrics = metrics
        self._lease_s = lease_s
        self._poll_s = poll_s
        self._watches: defaultdict[str, set[_RedisWatch]] = defaultdict(set)

    async def is_encoding(self, digest: str, patience: Patience) -> bool:
        """Return whether a replica holds the lease; False where the store cannot be asked."""
        return bool(await self._link.ask("exists", lambda: self._link.redis.exists(_key(digest)), patience))

    async def take(self, digest: str, patience: Patience) -> Lease | None:
        """Return the lease; None: another replica holds it. Where the store cannot be asked, everybody has it."""
        hold = Hold(self._link.redis, _key(digest), self._lease_s)
        taken = await self._link.ask("set", lambda: self._taken(hold), patience)
        if taken is None:
            self._metrics.leases.inc(outcome="failed")
            return _NoLease()
        if not taken:
            return None
        self._metrics.leases.inc(outcome="taken")
        return _RedisLease(hold, digest, self._lease_s / _RENEWALS)

    @contextmanager
    def watch(self, digest: str) -> Iterator[Watch]:
        """Listen for what the holder of the lease announces."""
        watch = _RedisWatch(self._poll_s)
        self._watches[digest].add(watch)
        try:
            yield watch
        finally:
            self._watches[digest].discard(watch)
            if not self._watches[digest]:
                del self._watches[digest]

    def hear(self, message: bytes) -> None:
        """Pass an announcement on to those who wait for it."""
        with suppress(ValueError, TypeError, KeyError):
            announced = json.loads(message)
            for watch in self._watches.get(announced["digest"], ()):
                watch.tell(refusal_of(announced) if "reason" in announced else None)

    async def _taken(self, hold: Hold) -> bool:
        async with self._link.redis.pipeline(transaction=False) as pipeline:
            hold.queue_take(pipeline)
            (taken,) = await pipeline.execute()
        return bool(taken)


class _NoLease:
    """The lease where nobody else could know of it."""

    async def finish(self, refusal: ServiceError | None = None) -> None:
        """Tell nobody."""


class _RedisLease:
    """A lease that a task renews until it is given back."""

    def __init__(self, hold: Hold, digest: str, renew_s: float) -> None:
        self._hold = hold
        self._digest = digest
        self._renew_s = renew_s
        self._renewing = asyncio.create_task(self._renew())

    async def finish(self, refusal: ServiceError | None = None) -> None:
        """Give the lease back and announce the outcome, both at once. Who has lost the lease announces nothing."""
        self._renewing.cancel()
        message = {"digest": self._digest}
        if refusal is not None and is_refusal(refusal):
            message |= {"reason": refusal.reason, "message": refusal.message}
        await self._hold.release(lambda pipeline: pipeline.publish(CHANNEL, json.dumps(message)))

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._renew_s)
            with suppress(StoreUnavailable):
                if not await self._hold.renew():
                    log.warning("encoding_lease_lost", digest=self._digest)
                    return


class _RedisWatch:
    """One who waits for the end of another replica's encode."""

    def __init__(self, poll_s: float) -> None:
        self._poll_s = poll_s
        self._told = asyncio.Event()
        self._refusal: ServiceError | None = None

    def tell(self, refusal: ServiceError | None) -> None:
        """Note what was announced."""
        self._refusal = refusal
        self._told.set()

    async def news(self) -> None:
        """Return when something was announced, or after a while; raise what is wrong with the medium."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._poll_s):
                await self._told.wait()
        self._told.clear()
        if self._refusal is not None:
            raise self._refusal


def _key(digest: str) -> str:
    return f"ivl:encoding:{digest}"
