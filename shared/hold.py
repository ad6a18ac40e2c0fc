"""The right to change something in Redis: a key with a token, held until it is given back or runs out."""

import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import WatchError

from shared.errors import StoreUnavailable
from shared.reach import reaching_store

log = structlog.get_logger()


class Hold:
    """One holder's right; `duration_ms` after it was taken or renewed it runs out. Raises `StoreUnavailable`.

    `purpose` says what the right is held for to others who would have it for the same.
    """

    def __init__(self, redis: Redis, key: str, duration_s: float, purpose: str = "") -> None:
        self.duration_ms = round(duration_s * 1000)
        self._redis = redis
        self._key = key
        self._purpose = f"/{purpose}" if purpose else ""  # no token has this character
        self._token = f"{secrets.token_urlsafe(16)}{self._purpose}"

    def queue_take(self, pipeline: Pipeline) -> None:
        """Queue the command that takes the right; its result is true where nobody else has it."""
        pipeline.set(self._key, self._token, nx=True, px=self.duration_ms)

    def queue_look(self, pipeline: Pipeline) -> None:
        """Queue the command whose result `has_same_purpose` understands."""
        pipeline.get(self._key)

    def has_same_purpose(self, holder: bytes | None) -> bool:
        """Return whether `holder` has the right for what it is wanted for here; False where no purpose is given."""
        return bool(self._purpose) and (holder or b"").endswith(self._purpose.encode())

    async def run(self, queue: Callable[[Pipeline], Any]) -> bool:
        """Run the queued commands at once if the right is still held; return whether it is.

        WATCH rather than a script: the store's user needs no right to run scripts. The holder's own renewal changes the
        key as well, so a change alone says nothing; only the token does. `queue` may be called more than once.
        """
        with reaching_store():
            while True:
                async with self._redis.pipeline() as pipeline:
                    await pipeline.watch(self._key)
                    if await pipeline.get(self._key) != self._token.encode():
                        return False
                    pipeline.multi()  # type: ignore[no-untyped-call]  # redis-py's own omission
                    queue(pipeline)
                    with suppress(WatchError):
                        await pipeline.execute()
                        return True

    async def renew(self, queue: Callable[[Pipeline], Any] = lambda pipeline: None) -> bool:
        """Hold the right for its whole duration again, with the queued commands; False: it was lost."""

        def renewal(pipeline: Pipeline) -> None:
            pipeline.pexpire(self._key, self.duration_ms)
            queue(pipeline)

        return await self.run(renewal)

    async def release(self, queue: Callable[[Pipeline], Any] = lambda pipeline: None) -> None:
        """Give the right back, with the queued commands. Never raises: what cannot be given back runs out."""

        def giving_back(pipeline: Pipeline) -> None:
            pipeline.delete(self._key)
            queue(pipeline)

        try:
            await self.run(giving_back)
        except StoreUnavailable:
            log.warning("lease_not_released")
