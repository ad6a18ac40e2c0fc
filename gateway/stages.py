"""The stages that the gateway calls: the replicas of each, behind channels of their own."""

import math
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import grpc

from gateway.routing import Endpoint, Fleet, FleetMetrics, RoutingPolicy, stage_fleet
from gateway.routing.metrics import Stage
from gateway.settings import GatewaySettings
from internvl_serving.llm.v1 import llm_service_pb2_grpc
from internvl_serving.vision.v1 import vision_service_pb2_grpc
from shared.errors import LlmUnavailable, Unavailable, VisionUnavailable
from shared.rpc.channel import open_channel
from shared.tls_files import watched


class Stages:
    """Opens stages, for as long as `stack` is open. `fleets` are those that were opened."""

    def __init__(self, settings: GatewaySettings, metrics: FleetMetrics, stack: AsyncExitStack) -> None:
        self._settings = settings
        self._tls = watched(settings.stage_tls)
        self._metrics = metrics
        self._stack = stack
        self.fleets: dict[Stage, Fleet] = {}

    async def vision(self, stage: Stage, target: str) -> Fleet:
        """Return a vision service's replicas. A large picture may take one long to answer, so none is held slow."""
        policy = replace(self._settings.routing, stall_s=math.inf)
        return await self._open(stage, target, vision_service_pb2_grpc.VisionServiceStub, VisionUnavailable, policy)

    async def llm(self, stage: Stage, target: str) -> Fleet:
        """Return an LLM service's replicas. They say that a prompt was accepted before they read it."""
        policy = self._settings.routing
        return await self._open(stage, target, llm_service_pb2_grpc.LlmServiceStub, LlmUnavailable, policy)

    async def _open(
        self,
        stage: Stage,
        target: str,
        stub: Callable[[grpc.aio.Channel], Any],
        unavailable: type[Unavailable],
        policy: RoutingPolicy,
    ) -> Fleet:
        fleet = stage_fleet(stage, target, self._connect, stub, unavailable, policy, self._metrics)
        self.fleets[stage] = await self._stack.enter_async_context(fleet)
        return self.fleets[stage]

    def _connect(self, endpoint: Endpoint) -> grpc.aio.Channel:
        # What is called may be an address; what the certificate bears is the name that it was found under.
        return open_channel(
            endpoint.address, self._settings.max_message_bytes, self._tls, name=endpoint.name, retries=False
        )
