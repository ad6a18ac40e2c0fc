"""A gateway that does what a test says, over real gRPC on a port of its own."""

import hashlib
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from internvl_serving.common.v1 import embedding_pb2, generation_pb2
from internvl_serving.gateway.v1 import (
    batch_service_pb2,
    batch_service_pb2_grpc,
    chat_service_pb2,
    chat_service_pb2_grpc,
    content_pb2,
    conversation_service_pb2,
    conversation_service_pb2_grpc,
    media_service_pb2,
    media_service_pb2_grpc,
    system_service_pb2,
    system_service_pb2_grpc,
)

Responses = Iterator[chat_service_pb2.ChatResponse]


class FakeGateway(
    chat_service_pb2_grpc.ChatServiceServicer,
    conversation_service_pb2_grpc.ConversationServiceServicer,
    media_service_pb2_grpc.MediaServiceServicer,
    batch_service_pb2_grpc.BatchServiceServicer,
    system_service_pb2_grpc.SystemServiceServicer,
    health_pb2_grpc.HealthServicer,
):
    """Holds media by digest, refuses chats that name others, and answers the rest with `answer`.

    A batch has `results`; each stream of them breaks off after the next count of `breaks`, if there is one. Media are
    prefetched from the last to the first, as far as `prefetch_limit`; those of `refused` digests are neither taken nor
    encoded. A picture's size is behind its first `header_bytes`.
    """

    def __init__(self) -> None:
        self.address = ""
        self.media: dict[str, bytes] = {}
        self.chats: list[chat_service_pb2.ChatRequest] = []
        self.metadata: list[dict[str, Any]] = []
        self.uploads: list[list[int]] = []
        self.asked: list[list[str]] = []
        self.cancelled = threading.Event()
        self.batches: list[batch_service_pb2.CreateBatchRequest] = []
        self.results: list[batch_service_pb2.BatchResult] = []
        self.breaks: list[int] = []
        self.ended: list[str] = []
        self.prefetches: list[media_service_pb2.PrefetchRequest] = []
        self.prefetch_limit: int | None = None
        self.refused: dict[str, str] = {}  # reason by digest
        self.estimates: list[media_service_pb2.EstimateRequest] = []
        self.header_bytes = 0
        self.deleted: list[str] = []
        self.readiness = health_pb2.HealthCheckResponse.SERVING
        self.status = system_service_pb2.GetStatusResponse()
        self.conversations: dict[str, conversation_service_pb2.CreateConversationRequest] = {}
        self.forks: list[conversation_service_pb2.ForkConversationRequest] = []
        self._numbers = itertools.count()
        self.answer: Callable[[chat_service_pb2.ChatRequest, grpc.ServicerContext], Responses] = (
            lambda request, context: answer_of("It ", "is a cat.")
        )

    def Chat(self, request: chat_service_pb2.ChatRequest, context: grpc.ServicerContext) -> Responses:
        self.chats.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        for digest in digests_of(request):
            if digest not in self.media:
                refuse(context, grpc.StatusCode.NOT_FOUND, "MEDIA_NOT_FOUND", resource_info(digest))
        yield from self.answer(request, context)

    def FindMissing(self, request: Any, context: Any) -> media_service_pb2.FindMissingResponse:
        self.asked.append(list(request.digests))
        missing = [digest for digest in request.digests if digest not in self.media]
        return media_service_pb2.FindMissingResponse(missing_digests=missing)

    def Upload(self, request_iterator: Any, context: Any) -> media_service_pb2.UploadResponse:
        digest = next(request_iterator).header.digest
        chunks = [request.chunk for request in request_iterator]
        content = b"".join(chunks)
        assert hashlib.sha256(content).hexdigest() == digest
        if digest in self.refused:
            refuse(context, grpc.StatusCode.INVALID_ARGUMENT, self.refused[digest])
        self.uploads.append([len(chunk) for chunk in chunks])
        self.media[digest] = content
        return media_service_pb2.UploadResponse(digest=digest, size_bytes=len(content))

    def Prefetch(self, request: Any, context: Any) -> Iterator[media_service_pb2.PrefetchResponse]:
        self.prefetches.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        for index in list(reversed(range(len(request.media))))[: self.prefetch_limit]:
            yield self._prefetched(index, request.media[index])

    def Estimate(self, request: Any, context: Any) -> media_service_pb2.EstimateResponse:
        self.estimates.append(request)
        medium = request.media
        if medium.digest and medium.digest not in self.media:
            refuse(context, grpc.StatusCode.NOT_FOUND, "MEDIA_NOT_FOUND", resource_info(medium.digest))
        content = self.media[medium.digest] if medium.digest else medium.inline
        if len(content) < self.header_bytes:
            refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "MEDIA_UNREADABLE")
        return media_service_pb2.EstimateResponse(
            width=640, height=480, columns=4, rows=3, tile_count=13, token_count=3328
        )

    def DeleteMedium(self, request: Any, context: Any) -> media_service_pb2.DeleteMediumResponse:
        self.deleted.append(request.digest)
        self.media.pop(request.digest, None)
        if request.digest in self.refused:
            refuse(context, grpc.StatusCode.UNAVAILABLE, self.refused[request.digest])
        return media_service_pb2.DeleteMediumResponse(embedding_count=2)

    def CreateConversation(self, request: Any, context: Any) -> conversation_service_pb2.CreateConversationResponse:
        identity = f"c{next(self._numbers)}"
        self.conversations[identity] = request
        return conversation_service_pb2.CreateConversationResponse(conversation=self._conversation(identity))

    def GetConversation(self, request: Any, context: Any) -> conversation_service_pb2.GetConversationResponse:
        if request.conversation_id not in self.conversations:
            missing = resource_info(request.conversation_id)
            refuse(context, grpc.StatusCode.NOT_FOUND, "CONVERSATION_NOT_FOUND", missing)
        conversation = self._conversation(request.conversation_id)
        return conversation_service_pb2.GetConversationResponse(conversation=conversation)

    def ListConversations(self, request: Any, context: Any) -> conversation_service_pb2.ListConversationsResponse:
        """Those that were made, the last one first, `page_size` at a time."""
        start = int(request.page_token or 0)
        end = min(len(self.conversations), start + request.page_size)
        made = [self._conversation(identity) for identity in list(self.conversations)[::-1][start:end]]
        token = str(end) if end < len(self.conversations) else ""
        return conversation_service_pb2.ListConversationsResponse(conversations=made, next_page_token=token)

    def ForkConversation(self, request: Any, context: Any) -> conversation_service_pb2.ForkConversationResponse:
        self.forks.append(request)
        identity = f"c{next(self._numbers)}"
        self.conversations[identity] = self.conversations[request.conversation_id]
        return conversation_service_pb2.ForkConversationResponse(conversation=self._conversation(identity))

    def ListMessages(self, request: Any, context: Any) -> conversation_service_pb2.ListMessagesResponse:
        """Three messages, `page_size` at a time."""
        start = int(request.page_token or 0)
        end = min(3, start + request.page_size)
        messages = [
            content_pb2.Message(
                role=generation_pb2.ROLE_USER,
                message_id=str(number),
                parts=[content_pb2.Part(text=str(number)), content_pb2.Part(media=content_pb2.Media(digest="d" * 64))],
            )
            for number in range(start, end)
        ]
        token = str(end) if end < 3 else ""
        return conversation_service_pb2.ListMessagesResponse(messages=messages, next_page_token=token)

    def DeleteConversation(self, request: Any, context: Any) -> conversation_service_pb2.DeleteConversationResponse:
        del self.conversations[request.conversation_id]
        return conversation_service_pb2.DeleteConversationResponse()

    def CreateBatch(self, request: Any, context: Any) -> batch_service_pb2.CreateBatchResponse:
        self.batches.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        return batch_service_pb2.CreateBatchResponse(batch=self._batch())

    def GetBatch(self, request: Any, context: Any) -> batch_service_pb2.GetBatchResponse:
        return batch_service_pb2.GetBatchResponse(batch=self._batch())

    def CancelBatch(self, request: Any, context: Any) -> batch_service_pb2.CancelBatchResponse:
        self.ended.append(request.batch_id)
        return batch_service_pb2.CancelBatchResponse(batch=self._batch())

    def StreamResults(self, request: Any, context: Any) -> Iterator[batch_service_pb2.StreamResultsResponse]:
        count = self.breaks.pop(0) if self.breaks else None
        for result in self.results[:count]:
            yield batch_service_pb2.StreamResultsResponse(result=result)
        if count is not None:
            refuse(context, grpc.StatusCode.UNAVAILABLE, "NOT_READY")

    def Check(self, request: Any, context: Any) -> health_pb2.HealthCheckResponse:
        return health_pb2.HealthCheckResponse(status=self.readiness)

    def GetStatus(self, request: Any, context: Any) -> system_service_pb2.GetStatusResponse:
        return self.status

    def _prefetched(self, index: int, medium: content_pb2.Media) -> media_service_pb2.PrefetchResponse:
        digest = medium.digest or hashlib.sha256(medium.inline).hexdigest()
        if medium.digest and medium.digest not in self.media:
            error = batch_service_pb2.BatchError(code=5, reason="MEDIA_NOT_FOUND", message="Ours.", resource=digest)
            return media_service_pb2.PrefetchResponse(index=index, error=error)
        if digest in self.refused:
            error = batch_service_pb2.BatchError(
                code=3, reason=self.refused[digest], message="Ours.", field=f"media[{index}]"
            )
            return media_service_pb2.PrefetchResponse(index=index, error=error)
        tier = embedding_pb2.CACHE_TIER_STORE if digest in self.media else embedding_pb2.CACHE_TIER_NONE
        receipt = chat_service_pb2.MediaReceipt(
            media_digest=digest, tile_count=13, columns=4, rows=3, token_count=3328, cache_tier=tier
        )
        return media_service_pb2.PrefetchResponse(index=index, receipt=receipt)

    def _batch(self) -> batch_service_pb2.Batch:
        state = batch_service_pb2.BATCH_STATE_CANCELLED if self.ended else batch_service_pb2.BATCH_STATE_RUNNING
        return batch_service_pb2.Batch(batch_id="b0", state=state, item_count=len(self.results), succeeded_count=1)

    def _conversation(self, identity: str) -> conversation_service_pb2.Conversation:
        created = self.conversations[identity]
        return conversation_service_pb2.Conversation(
            conversation_id=identity,
            system_message=created.system_message if created.HasField("system_message") else None,
        )


@contextmanager
def serving(gateway: FakeGateway) -> Iterator[FakeGateway]:
    """Serve `gateway` on a free port."""
    options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 8 << 20)]
    server = grpc.server(ThreadPoolExecutor(8), options=options)
    gateway.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    chat_service_pb2_grpc.add_ChatServiceServicer_to_server(gateway, server)
    conversation_service_pb2_grpc.add_ConversationServiceServicer_to_server(gateway, server)
    media_service_pb2_grpc.add_MediaServiceServicer_to_server(gateway, server)
    batch_service_pb2_grpc.add_BatchServiceServicer_to_server(gateway, server)
    system_service_pb2_grpc.add_SystemServiceServicer_to_server(gateway, server)
    health_pb2_grpc.add_HealthServicer_to_server(gateway, server)
    server.start()
    try:
        yield gateway
    finally:
        server.stop(0).wait()


def answer_of(*pieces: str, token_ids: bool = False) -> Responses:
    """The events of a whole answer."""
    yield chat_service_pb2.ChatResponse(
        started=chat_service_pb2.ChatStarted(request_id="from-server", model="tiny", prompt_token_count=9)
    )
    for number, piece in enumerate(pieces):
        delta = chat_service_pb2.ChatDelta(text=piece, token_ids=[number] if token_ids else [])
        yield chat_service_pb2.ChatResponse(delta=delta)
    yield chat_service_pb2.ChatResponse(
        finished=chat_service_pb2.ChatFinished(
            finish_reason=generation_pb2.FINISH_REASON_STOP,
            usage=generation_pb2.TokenUsage(prompt_token_count=9, visual_token_count=4, output_token_count=3),
            timings=chat_service_pb2.ChatTimings(decode_duration=Duration(nanos=500_000_000)),
            receipts=[
                chat_service_pb2.MediaReceipt(
                    media_digest="a" * 64, tile_count=1, cache_tier=embedding_pb2.CACHE_TIER_NONE, token_count=4
                )
            ],
        )
    )


def candidates_of(*texts: str, best: int = 0) -> Responses:
    """The events of an answer with several candidates, which come side by side."""
    yield from list(answer_of())[:1]
    for half in (0, 1):
        for index, text in enumerate(texts):
            middle = len(text) // 2
            logprob = generation_pb2.TokenLogprob(token_id=index, token=b"x", logprob=-1.0)
            delta = chat_service_pb2.ChatDelta(
                text=text[middle:] if half else text[:middle],
                token_ids=[index],
                candidate_index=index,
                logprobs=[logprob],
            )
            yield chat_service_pb2.ChatResponse(delta=delta)
    ended = [
        chat_service_pb2.Candidate(
            finish_reason=generation_pb2.FINISH_REASON_LENGTH,
            output_token_count=2,
            step_scores=[0.25, 0.5],
            score=1 - abs(index - best) / 4,
            tool_calls=[generation_pb2.ToolCall(name=text, arguments_json='{"x": 1}', tool_call_id=f"call_{index}")],
        )
        for index, text in enumerate(texts)
    ]
    finished = chat_service_pb2.ChatFinished(
        finish_reason=generation_pb2.FINISH_REASON_LENGTH, candidates=ended, best_candidate_index=best
    )
    yield chat_service_pb2.ChatResponse(finished=finished)


def endless(gateway: FakeGateway, context: grpc.ServicerContext) -> Responses:
    """Deltas until the call ends, which `gateway.cancelled` then says."""
    context.add_callback(gateway.cancelled.set)
    yield from list(answer_of())[:1]
    while context.is_active():
        yield chat_service_pb2.ChatResponse(delta=chat_service_pb2.ChatDelta(text="more "))
        gateway.cancelled.wait(0.01)


def refuse(context: grpc.ServicerContext, code: grpc.StatusCode, reason: str, *details: Message) -> None:
    """End the call with one of our statuses."""
    status = status_pb2.Status(code=code.value[0], message="Ours.")
    for detail in (error_details_pb2.ErrorInfo(reason=reason, domain="internvl-serving"), *details):
        status.details.add().Pack(detail)
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(code, "Ours.")


def resource_info(name: str) -> error_details_pb2.ResourceInfo:
    """Names what is missing."""
    return error_details_pb2.ResourceInfo(resource_name=name)


def digests_of(request: chat_service_pb2.ChatRequest) -> list[str]:
    """Digests of the media that the request does not carry inline."""
    media = [part.media for message in request.messages for part in message.parts if part.HasField("media")]
    for message in request.messages:
        for part in message.parts:
            media += part.group.media
    return [medium.digest for medium in media if medium.digest]
