"""`GetStatus` of the gateway, over real channels to stages that answer it, are older, or are gone."""

from pathlib import Path
from typing import Any

from internvl_serving.gateway.v1 import system_service_pb2, system_service_pb2_grpc
from internvl_serving.llm.v1 import llm_service_pb2
from shared.rpc.status_messages import status_message, status_of
from shared.service_status import ModelStatus, ServiceStatus, StoreStatus
from tests.rpc.scripted_stages import (
    Client,
    ScriptedLlm,
    ScriptedVision,
    gateway_over,
    running,
    stages_of,
    until_serving,
)

READY, UNREACHABLE = system_service_pb2.STAGE_STATE_READY, system_service_pb2.STAGE_STATE_UNREACHABLE
LLM = ServiceStatus("9.9", 1_700_000_000.0, 5, 6, ModelStatus("tiny", 64, 256, "float32", "cpu"), StoreStatus(False))


class TellingLlm(ScriptedLlm):
    """An LLM service that says how it is."""

    async def GetStatus(self, request: Any, context: Any) -> llm_service_pb2.GetStatusResponse:
        return llm_service_pb2.GetStatusResponse(status=status_message(LLM))


async def status_from(channel: Any) -> system_service_pb2.GetStatusResponse:
    stub: Any = system_service_pb2_grpc.SystemServiceStub(channel)
    answer: system_service_pb2.GetStatusResponse = await stub.GetStatus(system_service_pb2.GetStatusRequest())
    return answer


async def test_stages_and_the_store_are_seen_through_the_gateway(tmp_path: Path, redis_url: str) -> None:
    vision_stage, llm_stage = await stages_of(ScriptedVision(), TellingLlm())
    async with gateway_over(tmp_path, vision_stage.address, llm_stage.address, redis_url) as channel:
        await until_serving(channel)
        found = await status_from(channel)
        assert found.gateway.version
        assert found.gateway.store.is_reachable
        assert found.gateway.store.eviction_policy
        assert not found.HasField("media_store")
        # The vision service here is an older one, which knows no such call.
        assert [(stage.name, stage.state) for stage in found.stages] == [("vision", READY), ("llm", READY)]
        assert [stage.HasField("status") for stage in found.stages] == [False, True]
        assert status_of(found.stages[1].status) == LLM
    await vision_stage.server.stop(None)
    await llm_stage.server.stop(None)


async def test_what_is_gone_is_unreachable_and_nothing_fails(tmp_path: Path) -> None:
    client: Client
    async with running(tmp_path, "redis://127.0.0.1:1") as client:
        await client.vision_stage.server.stop(None)
        found = await status_from(client.channel)
        states = {stage.name: stage.state for stage in found.stages}
        assert states == {"vision": UNREACHABLE, "llm": READY}
        assert found.gateway.HasField("store")
        assert not found.gateway.store.is_reachable
