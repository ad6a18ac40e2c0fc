"""`python -m tests.faults.scripted_llm`: an LLM service without a model, as a process; its answers are its own id.

What a question's last text says is done: "endless" goes on for ever, "first is silent" has the first replica that reads
it say nothing after `started`. Anything else is answered at once.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from internvl_serving.common.v1 import generation_pb2
from internvl_serving.llm.v1 import llm_service_pb2, llm_service_pb2_grpc
from shared.metrics import Registry
from shared.rpc.server import Application, run
from shared.settings import ServiceSettings


class ScriptedSettings(ServiceSettings):
    """`directory` is where replicas tell each other what they have read."""

    directory: Path


class Replica(llm_service_pb2_grpc.LlmServiceServicer):
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._name = str(os.getpid())

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[llm_service_pb2.GenerateResponse]:
        wish = request.prompt.turns[-1].segments[-1].text
        started = llm_service_pb2.GenerateStarted(model=self._name, prompt_token_count=1)
        yield llm_service_pb2.GenerateResponse(started=started)
        if wish == "first is silent" and self._is_first():
            await asyncio.Event().wait()
        yield self._delta()
        while wish == "endless":
            await asyncio.sleep(0.02)
            yield self._delta()
        finished = llm_service_pb2.GenerateFinished(finish_reason=generation_pb2.FINISH_REASON_STOP)
        yield llm_service_pb2.GenerateResponse(finished=finished)

    def _delta(self) -> llm_service_pb2.GenerateResponse:
        return llm_service_pb2.GenerateResponse(delta=llm_service_pb2.GenerateDelta(text=f"{self._name} "))

    def _is_first(self) -> bool:
        try:
            (self._directory / "read").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


@asynccontextmanager
async def lifespan(settings: ScriptedSettings, address: str, registry: Registry) -> AsyncIterator[Application]:
    replica = Replica(settings.directory)
    yield Application(
        lambda server: llm_service_pb2_grpc.add_LlmServiceServicer_to_server(replica, server),
        [llm_service_pb2.DESCRIPTOR.services_by_name["LlmService"].full_name],
    )


if __name__ == "__main__":
    run(ScriptedSettings.from_command_line("scripted_llm"), "llm", lifespan)
