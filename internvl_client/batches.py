"""Batches of the blocking client: many questions that the server answers by itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, TypeAlias

from internvl_client import batch_convert
from internvl_client.channel import CallScope
from internvl_client.errors import InternVLError, ServerError, UnavailableError, translated
from internvl_client.types import Answer, BatchInfo
from internvl_serving.gateway.v1 import batch_service_pb2

if TYPE_CHECKING:
    from internvl_client.client import Client

Outcome: TypeAlias = Answer | InternVLError
# A gateway that is lost takes nothing with it: another goes on. So a stream of results is opened again a few times.
MAX_LOSSES: Final = 5
LOSS_PAUSE_S: Final = 1.0
CANCEL_TIMEOUT_S: Final = 5.0


class Batch:
    """A batch at the server. It goes on without this object; who knows its id can read it."""

    def __init__(self, client: Client, batch_id: str, request_id: str = "") -> None:
        self._client = client
        self._request_id = request_id
        self.batch_id = batch_id

    def info(self, *, timeout_s: float | None = None) -> BatchInfo:
        """Return the batch as it stands."""
        request = batch_service_pb2.GetBatchRequest(batch_id=self.batch_id)
        client = self._client
        return batch_convert.info_of(client._unary(client._batches.GetBatch, request, client._scope(timeout_s)).batch)

    def cancel(self, *, timeout_s: float | None = None) -> BatchInfo:
        """End the batch early; the results that it has stay."""
        request = batch_service_pb2.CancelBatchRequest(batch_id=self.batch_id)
        client = self._client
        return batch_convert.info_of(
            client._unary(client._batches.CancelBatch, request, client._scope(timeout_s)).batch
        )

    def results(self, *, timeout_s: float | None = None) -> Iterator[tuple[int, Outcome]]:
        """Yield the index of each item and what became of it, as they end; an item that failed is its error.

        Those that are there already come first. Ends when there will be no more. A gateway that is lost meanwhile is
        asked again, or another one in its place.
        """
        scope = self._client._scope(timeout_s)
        seen: set[int] = set()
        losses = 0
        while True:
            try:
                for result in self._stream(scope):
                    if result.item_index not in seen:
                        seen.add(result.item_index)
                        losses = 0
                        yield result.item_index, batch_convert.outcome_of(result, self._request_id)
                return
            except UnavailableError:
                losses += 1
                if losses > MAX_LOSSES:
                    raise
                time.sleep(LOSS_PAUSE_S)

    def _stream(self, scope: CallScope) -> Iterator[batch_service_pb2.BatchResult]:
        request = batch_service_pb2.StreamResultsRequest(batch_id=self.batch_id)
        call = self._client._batches.StreamResults(request, **scope.options())
        try:
            with translated(self._client.address, scope.request_id):
                for response in call:
                    yield response.result
        finally:
            call.cancel()


def missing_result() -> InternVLError:
    """Return what an item is answered with whose batch was ended before."""
    return ServerError("The batch was ended before this item was answered.")
