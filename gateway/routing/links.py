"""Channels to replicas: calls go over them, and their state says whether the replica serves."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc

from gateway.routing.fleet import Fleet
from gateway.routing.metrics import FleetMetrics, Stage
from gateway.routing.replica import RoutingPolicy
from gateway.routing.targets import Endpoint, Targets
from shared.errors import Unavailable
from shared.tasks import cancelled


class ReplicaLink:
    """A channel to one replica.

    The channel's service config has gRPC watch the replica's health: it is READY only while there is a connection and
    `readiness` is SERVING, or the replica knows no health checks. A call in progress outlives both.
    """

    def __init__(self, channel: grpc.aio.Channel, stub: Callable[[grpc.aio.Channel], Any]) -> None:
        self._channel = channel
        self.stub = stub(channel)

    async def watch(self, note: Callable[[bool], None]) -> None:
        """Connect, stay connected, and say whether the replica serves."""
        state = self._channel.get_state(try_to_connect=True)
        while state is not grpc.ChannelConnectivity.SHUTDOWN:
            note(state is grpc.ChannelConnectivity.READY)
            with suppress(grpc.aio.UsageError):  # closed, or put aside for one with new certificates
                await self._channel.wait_for_state_change(state)
            # A channel that nobody has used for long goes to sleep; this wakes it.
            state = self._channel.get_state(try_to_connect=True)

    async def aclose(self) -> None:
        """Close the channel."""
        await self._channel.close()


@asynccontextmanager
async def stage_fleet(
    stage: Stage,
    target: str,
    connect: Callable[[Endpoint], grpc.aio.Channel],
    stub: Callable[[grpc.aio.Channel], Any],
    unavailable: type[Unavailable],
    policy: RoutingPolicy,
    metrics: FleetMetrics,
) -> AsyncIterator[Fleet]:
    """Yield the replicas of a stage, kept up to date while the context lasts."""

    def open_link(endpoint: Endpoint) -> ReplicaLink:
        return ReplicaLink(connect(endpoint), stub)

    fleet = Fleet(stage, Targets(target), open_link, unavailable, policy, metrics)
    running = asyncio.create_task(fleet.run())
    try:
        yield fleet
    finally:
        await cancelled(running)
        await fleet.aclose()
