"""Batches of the asyncio client: many questions that the server answers by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from internvl_client import batch_convert
from internvl_client.batches import LOSS_PAUSE_S, MAX_LOSSES, Outcome
from internvl_client.channel import CallScope
from internvl_client.errors import UnavailableError, translated
from internvl_client.types import BatchInfo
from internvl_serving.gateway.v1 import batch_service_pb2

if TYPE_CHECKING:
    from internvl_client.async_client import AsyncClient


class AsyncBatch:
    """A batch at the server. It goes on without this object; who knows its id can read it."""

    def __init__(self, client: AsyncClient, batch_id: str, request_id: str = "") -> None:
        self._client = client
        self._request_id = request_id
        self.batch_id = batch_id

    async def info(self, *, timeout_s: float | None = None) -> BatchInfo:
        """Return the batch as it stands."""
        request = batch_service_pb2.GetBatchRequest(batch_id=self.batch_id)
        client = self._client
        response = await client._unary(client._batches.GetBatch, request, client._scope(timeout_s))
        return batch_convert.info_of(response.batch)

    async def cancel(self, *, timeout_s: float | None = None) -> BatchInfo:
        """End the batch early; the results that it has stay."""
        request = batch_service_pb2.CancelBatchRequest(batch_id=self.batch_id)
        client = self._client
        response = await client._unary(client._batches.CancelBatch, request, client._scope(timeout_s))
        return batch_convert.info_of(response.batch)

    async def results(self, *, timeout_s: float | None = None) -> AsyncGenerator[tuple[int, Outcome], None]:
        """Yield the index of each item and what became of it, as they end; an item that failed is its error.

        Those that are there already come first. Ends when there will be no more. A gateway that is lost meanwhile is
        asked again, or another one in its place.
        """
        scope = self._client._scope(timeout_s)
        seen: set[int] = set()
        losses = 0
        while True:
            try:
                async with aclosing(self._stream(scope)) as results:
                    async for result in results:
                        if result.item_index not in seen:
                            seen.add(result.item_index)
                            losses = 0
                            yield result.item_index, batch_convert.outcome_of(result, self._request_id)
                return
            except UnavailableError:
                losses += 1
                if losses > MAX_LOSSES:
                    raise
                await asyncio.sleep(LOSS_PAUSE_S)

    async def _stream(self, scope: CallScope) -> AsyncGenerator[batch_service_pb2.BatchResult, None]:
        request = batch_service_pb2.StreamResultsRequest(batch_id=self.batch_id)
        call = self._client._batches.StreamResults(request, **scope.options())
        try:
            with translated(self._client.address, scope.request_id):
                async for response in call:
                    yield response.result
        finally:
            call.cancel()
