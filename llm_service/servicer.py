"""llm.v1.LlmService: parse, call, render."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from internvl_serving.llm.v1 import llm_service_pb2 as pb
from internvl_serving.llm.v1 import llm_service_pb2_grpc
from llm_service import convert
from llm_service.answerer import Answerer, Started
from shared.rpc.handles import HandleSigner
from shared.rpc.status_messages import status_message
from shared.service_status import ProcessStatus, StatusSource


class LlmServicer(llm_service_pb2_grpc.LlmServiceServicer):
    """Answers the service's calls once `answerer` is there."""

    def __init__(self, default_output_tokens: int, signer: HandleSigner, process: StatusSource | None = None) -> None:
        self._default_output_tokens = default_output_tokens
        self._signer = signer
        self._process = process or ProcessStatus()
        self.answerer: Answerer | None = None

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        """Stream one answer."""
        answerer = self._ready()
        dialogue = convert.dialogue_of(request.prompt, self._signer, grounding=request.generation_config.grounding)
        options = convert.options_of(
            request.generation_config, self._default_output_tokens, answerer.facts.stop_token_ids
        )
        options = replace(
            options, priority=convert.priority_of(request), drops_oldest_turns=convert.drops_oldest_turns(request)
        )
        async with aclosing(answerer.answer(dialogue, options)) as events:
            async for event in events:
                if isinstance(event, Started):
                    prompt = event.prompt
                yield convert.response_of(event, prompt, answerer.facts.name, with_ids=request.return_token_ids)

    async def CountTokens(self, request: pb.CountTokensRequest, context: Any) -> pb.CountTokensResponse:
        """Measure a prompt, or plain text."""
        answerer = self._ready()
        if request.HasField("text"):
            prompt = await answerer.tokenize_text(request.text)
        else:
            dialogue = convert.dialogue_of(request.prompt, self._signer, grounding=request.grounding)
            prompt = await answerer.tokenize(dialogue)
        return convert.count_response_of(prompt, with_ids=request.return_token_ids)

    async def DescribeModel(self, request: pb.DescribeModelRequest, context: Any) -> pb.DescribeModelResponse:
        """Say what model is served."""
        answerer = self._ready()
        return convert.description_of(answerer.facts.name, answerer.max_tokens)

    async def ScoreTurns(self, request: pb.ScoreTurnsRequest, context: Any) -> pb.ScoreTurnsResponse:
        """Score a dialogue's turns."""
        answerer = self._ready()
        scores = await answerer.score(convert.dialogue_of(request.prompt, self._signer), convert.choices_of(request))
        return convert.score_response_of(scores, answerer.facts.name)

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        """Say how this replica is."""
        return pb.GetStatusResponse(status=status_message(await self._process.status()))

    def _ready(self) -> Answerer:
        assert self.answerer is not None  # no call is admitted before warm-up has ended
        return self.answerer
