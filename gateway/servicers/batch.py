"""`BatchService`."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from gateway import batch_messages
from gateway.batches import Batches
from internvl_serving.gateway.v1 import batch_service_pb2 as messages
from internvl_serving.gateway.v1 import batch_service_pb2_grpc


class BatchServicer(batch_service_pb2_grpc.BatchServiceServicer):
    """Answers many independent questions."""

    def __init__(self, batches: Batches, max_media_bytes: int) -> None:
        self._batches = batches
        self._max_media_bytes = max_media_bytes

    async def CreateBatch(self, request: messages.CreateBatchRequest, context: Any) -> messages.CreateBatchResponse:
        """Begin a batch."""
        new = await asyncio.to_thread(batch_messages.new_batch, request, self._max_media_bytes)
        return messages.CreateBatchResponse(batch=batch_messages.batch(await self._batches.create(new)))

    async def GetBatch(self, request: messages.GetBatchRequest, context: Any) -> messages.GetBatchResponse:
        """Return how far a batch has come."""
        found = await self._batches.get(request.batch_id)
        return messages.GetBatchResponse(batch=batch_messages.batch(found))

    async def CancelBatch(self, request: messages.CancelBatchRequest, context: Any) -> messages.CancelBatchResponse:
        """End a batch early."""
        ended = await self._batches.cancel(request.batch_id)
        return messages.CancelBatchResponse(batch=batch_messages.batch(ended))

    async def StreamResults(
        self, request: messages.StreamResultsRequest, context: Any
    ) -> AsyncGenerator[messages.StreamResultsResponse, None]:
        """Stream results as they come."""
        async with aclosing(self._batches.results(request.batch_id)) as results:
            async for result in results:
                yield batch_messages.result_response(result)
