"""What processes tell each other through Redis: short messages on channels, heard by whoever listens at the moment."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

log = structlog.get_logger()
_PAUSE_S: Final = 1.0  # before a lost connection is made anew
_QUIET_S: Final = 5.0  # without a message, after which the connection is tested

Heard = Callable[[bytes], None]


class Announcements:
    """Listens on channels with one connection, for as long as `run` runs.

    `heard` names what is called with each message of a channel, on the event loop. `connected` is called whenever
    listening begins: what was said before is lost, so whoever must not miss anything has to assume the worst.
    """

    def __init__(self, redis: Redis, heard: Mapping[str, Heard], connected: Callable[[], None] = lambda: None) -> None:
        self._redis = redis
        self._heard = heard
        self._connected = connected

    async def run(self) -> NoReturn:
        """Listen until cancelled; a store that cannot be reached is tried again and again."""
        while True:
            try:
                async with self._redis.pubsub() as listener:
                    await listener.subscribe(*self._heard)
                    await self._listen(listener)
            except (RedisError, OSError, TimeoutError) as error:
                log.info("announcements_lost", error=type(error).__name__)
            await asyncio.sleep(_PAUSE_S)

    async def _listen(self, listener: Any) -> NoReturn:
        awaited, tested = set(self._heard), False
        while True:
            message = await listener.get_message(timeout=_QUIET_S)
            if message is None and tested:
                raise TimeoutError  # the test was not answered: the other side is gone, and nothing says so
            tested = message is None
            if message is None:
                await listener.ping()
            elif message["type"] == "subscribe":
                awaited.discard(message["channel"].decode())
                if not awaited:
                    self._connected()
            elif message["type"] == "message":
                self._heard[message["channel"].decode()](message["data"])
