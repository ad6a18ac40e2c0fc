"""`SystemService`."""

from typing import Any

from gateway.system import StageState, System
from internvl_serving.gateway.v1 import system_service_pb2, system_service_pb2_grpc
from shared.rpc.status_messages import status_message, store_message

_STATES = {state: system_service_pb2.StageState.Value(f"STAGE_STATE_{state.value}") for state in StageState}


class SystemServicer(system_service_pb2_grpc.SystemServiceServicer):
    """Says how the system is."""

    def __init__(self, system: System) -> None:
        self._system = system

    async def GetStatus(
        self, request: system_service_pb2.GetStatusRequest, context: Any
    ) -> system_service_pb2.GetStatusResponse:
        """Return how the gateway is, and what stands behind it."""
        found = await self._system.status()
        stages = [
            system_service_pb2.Stage(
                name=stage.name,
                state=_STATES[stage.state],
                status=status_message(stage.status) if stage.status else None,
            )
            for stage in found.stages
        ]
        return system_service_pb2.GetStatusResponse(
            gateway=status_message(found.gateway),
            stages=stages,
            media_store=store_message(found.media_store) if found.media_store else None,
        )
