"""Asks each replica of a stage how it is."""

from typing import Any, Final

import grpc

from gateway.routing import Fleet
from gateway.routing.metrics import Stage
from internvl_serving.llm.v1 import llm_service_pb2
from internvl_serving.vision.v1 import vision_service_pb2
from shared.errors import LlmUnavailable, VisionUnavailable
from shared.rpc.deadline import outgoing
from shared.rpc.status import from_rpc_error
from shared.rpc.status_messages import status_of
from shared.service_status import ServiceStatus

_TIMEOUT_S: Final = 3.0


class StageProbe:
    """One replica, asked past all routing: also one that gets no calls. Raises `Unavailable`, `DeadlineExceeded`."""

    def __init__(self, stub: Any, *, is_vision: bool) -> None:
        self._stub = stub
        self._request = vision_service_pb2.GetStatusRequest() if is_vision else llm_service_pb2.GetStatusRequest()
        self._unavailable = VisionUnavailable if is_vision else LlmUnavailable

    async def status(self) -> ServiceStatus:
        """Return how the replica is."""
        call = self._stub.GetStatus(self._request, **outgoing(_TIMEOUT_S))
        try:
            return status_of((await call).status)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self._unavailable) from error
        finally:
            call.cancel()  # a call object that is dropped goes on otherwise


def probes_of(stage: Stage, fleet: Fleet) -> list[StageProbe]:
    """Return what asks the replicas that are known at this moment."""
    return [StageProbe(stub, is_vision=stage in ("vision", "critic_vision")) for stub in fleet.stubs]
