"""Between the messages of batches and the gateway's own types, and how items and results are written as bytes."""

from collections.abc import Iterator

from gateway import convert
from gateway.batch_store import Batch
from gateway.batches import ItemAnswer, NewBatch
from gateway.events import ChatRequest
from internvl_serving.gateway.v1 import batch_service_pb2, chat_service_pb2, content_pb2
from shared.digest import checked_digest, digest_of
from shared.errors import InvalidGenerationConfig, InvalidRequest, ServiceError

_TOO_LONG = "The answer is larger than a result of a batch may be; ask for fewer tokens, candidates or top_logprobs."


def new_batch(request: batch_service_pb2.CreateBatchRequest, max_media_bytes: int) -> NewBatch:
    """Return what is to be asked; media that came along are named by their digests from here on.

    An item that cannot be asked fails alone and later, except where it belongs to a kept conversation. Hashes up to a
    whole message of bytes: not for the event loop.
    """
    items: list[bytes] = []
    contents: dict[str, bytes] = {}
    named: set[str] = set()
    for index, item in enumerate(request.items):
        if item.conversation_id:
            raise InvalidRequest("A batch has no kept conversations.", field=f"items[{index}].conversation_id")
        for media in _media(item):
            # What is empty or too large stays where it is: the item is refused when it is asked.
            if 0 < len(media.inline) <= max_media_bytes:
                digest = digest_of(media.inline)
                contents[digest] = media.inline
                media.digest = digest
            elif _is_digest(media.digest):
                named.add(media.digest)
        items.append(item.SerializeToString())
    return NewBatch(
        tuple(items),
        contents,
        frozenset(named),
        request.concurrency,
        request.ttl.seconds if request.HasField("ttl") else None,
    )


def batch(found: Batch) -> batch_service_pb2.Batch:
    """Return the batch's message."""
    return batch_service_pb2.Batch(
        batch_id=found.batch_id,
        state=batch_service_pb2.BatchState.Value(f"BATCH_STATE_{found.state}"),
        item_count=found.item_count,
        succeeded_count=found.succeeded_count,
        failed_count=found.failed_count,
        create_time=convert.timestamp(found.create_time),
        expire_time=convert.timestamp(found.expire_time),
    )


def result_response(value: bytes) -> batch_service_pb2.StreamResultsResponse:
    """Return the message of a result that `MessageFormat` wrote."""
    return batch_service_pb2.StreamResultsResponse(result=batch_service_pb2.BatchResult.FromString(value))


class MessageFormat:
    """Items and results as serialized messages of the API, results of at most `max_result_bytes`."""

    def __init__(self, max_result_bytes: int) -> None:
        self._max_result_bytes = max_result_bytes

    def read_item(self, value: bytes) -> ChatRequest:
        """Return the question; raise `InvalidRequest` for one that is malformed."""
        return convert.chat_request(chat_service_pb2.ChatRequest.FromString(value))

    def write_result(self, index: int, outcome: ItemAnswer | ServiceError) -> bytes:
        """Return what became of an item."""
        if isinstance(outcome, ServiceError):
            return batch_service_pb2.BatchResult(
                item_index=index, error=convert.error_message(outcome)
            ).SerializeToString()
        result = batch_service_pb2.BatchResult(item_index=index, answer=_answer(outcome)).SerializeToString()
        if len(result) > self._max_result_bytes:
            # A chat brings the same in many messages; a result is one, and one that nobody can receive is none.
            return self.write_result(index, InvalidGenerationConfig(_TOO_LONG, field="generation_config"))
        return result


def _answer(answer: ItemAnswer) -> batch_service_pb2.BatchAnswer:
    candidates = [batch_service_pb2.BatchCandidate(text=candidate.text) for candidate in answer.finished.candidates]
    for delta in answer.deltas:
        candidate = candidates[delta.candidate_index]
        candidate.token_ids.extend(delta.token_ids)
        candidate.logprobs.extend(map(convert.logprob_message, delta.logprobs))
    return batch_service_pb2.BatchAnswer(
        text=answer.finished.best.text,
        started=convert.chat_started(answer.started),
        finished=convert.chat_finished(answer.finished),
        candidates=candidates,
    )


def _is_digest(text: str) -> bool:
    try:
        return bool(checked_digest(text, "digest"))
    except InvalidRequest:
        return False


def _media(item: chat_service_pb2.ChatRequest) -> Iterator[content_pb2.Media]:
    for message in item.messages:
        for part in message.parts:
            if part.HasField("media"):
                yield part.media
            yield from part.group.media
