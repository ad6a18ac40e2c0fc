"""A channel that takes up certificates as their files are replaced, which grpcio's own never does."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

import grpc

from shared.tls_files import TlsContent, WatchedTls

_OLD_CALLS_S: Final = 3600.0  # what calls that began before a renewal get


class RenewedChannel(grpc.aio.Channel):
    """Passes calls on to a channel made by `open_one`, and to another once the files have been replaced.

    Calls that are running end where they began. One event loop only.
    """

    def __init__(self, watched: WatchedTls, open_one: Callable[[TlsContent], grpc.aio.Channel]) -> None:
        self._watched, self._open = watched, open_one
        self._content = watched.content
        self._channel = open_one(self._content)
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def current(self) -> grpc.aio.Channel:
        """The channel for the next call."""
        # On the event loop, because a look at a few kB now and then costs less than a thread.
        if (content := self._watched.content) is not self._content:
            self._leave(self._channel)
            self._content, self._channel = content, self._open(content)
        return self._channel

    def _leave(self, channel: grpc.aio.Channel) -> None:
        closing = asyncio.create_task(channel.close(_OLD_CALLS_S))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def close(self, grace: float | None = None) -> None:
        """Close the channel, and those that calls still run on."""
        for closing in self._closing:
            closing.cancel()
        await self._channel.close(grace)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Return the state of the current channel."""
        return self.current.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Wait until the current channel's state is another."""
        await self.current.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Wait until the current channel is connected."""
        await self.current.channel_ready()

    def unary_unary(self, *arguments: Any, **options: Any) -> Any:
        """Return what makes calls of a method."""
        return _Method(self, lambda channel: channel.unary_unary(*arguments, **options))

    def unary_stream(self, *arguments: Any, **options: Any) -> Any:
        """Return what makes calls of a method."""
        return _Method(self, lambda channel: channel.unary_stream(*arguments, **options))

    def stream_unary(self, *arguments: Any, **options: Any) -> Any:
        """Return what makes calls of a method."""
        return _Method(self, lambda channel: channel.stream_unary(*arguments, **options))

    def stream_stream(self, *arguments: Any, **options: Any) -> Any:
        """Return what makes calls of a method."""
        return _Method(self, lambda channel: channel.stream_stream(*arguments, **options))


class _Method:
    """Makes calls of one method, each through the channel of the moment."""

    def __init__(self, channel: RenewedChannel, bind: Callable[[grpc.aio.Channel], Any]) -> None:
        self._channel, self._bind = channel, bind
        self._bound_to: grpc.aio.Channel | None = None
        self._call: Any = None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if (current := self._channel.current) is not self._bound_to:
            self._bound_to, self._call = current, self._bind(current)
        return self._call(*arguments, **options)
