"""Turns the messages of batches into the client's types."""

from __future__ import annotations

from internvl_client import convert
from internvl_client.errors import InternVLError, error_of_item
from internvl_client.plan import AnswerCollector
from internvl_client.types import Answer, BatchInfo, BatchState, Delta
from internvl_serving.gateway.v1 import batch_service_pb2

_STATES = {int(batch_service_pb2.BatchState.Value(f"BATCH_STATE_{state}")): state for state in BatchState}
_MAX_REQUEST_ID_CHARS = 128


def info_of(batch: batch_service_pb2.Batch) -> BatchInfo:
    """Return the batch as it stands."""
    return BatchInfo(
        batch.batch_id,
        _STATES.get(batch.state, BatchState.UNSPECIFIED),
        batch.item_count,
        batch.succeeded_count,
        batch.failed_count,
        convert.time_of(batch.create_time),
        convert.time_of(batch.expire_time),
    )


def outcome_of(result: batch_service_pb2.BatchResult, request_id: str) -> Answer | InternVLError:
    """Return what became of an item; `request_id` is that of the call that made the batch, where it is known."""
    item_id = _item_request_id(request_id, result.item_index) if request_id else ""
    if result.WhichOneof("outcome") == "error":
        return error_of(result.error, item_id)
    return _answer_of(result.answer, item_id)


def error_of(error: batch_service_pb2.BatchError, request_id: str) -> InternVLError:
    """Return the error that one item of many ended with."""
    return error_of_item(
        error.code, error.reason, error.message, field=error.field, resource=error.resource, request_id=request_id
    )


def _answer_of(answer: batch_service_pb2.BatchAnswer, request_id: str) -> Answer:
    collector = AnswerCollector(request_id)
    collector.add(convert.started_of(answer.started))
    for index, candidate in enumerate(answer.candidates):
        logprobs = convert.logprobs_of(candidate.logprobs)
        collector.add(Delta(candidate.text, tuple(candidate.token_ids), index, logprobs))
    collector.add(convert.finished_of(answer.finished))
    return collector.answer()


def _item_request_id(request_id: str, index: int) -> str:
    """Return the request id that the server gives an item: cut where it would become too long for one."""
    ending = f".{index}"
    return f"{request_id[: _MAX_REQUEST_ID_CHARS - len(ending)]}{ending}"
