"""Between the generated messages and the gateway's own types, both ways; what is malformed raises here."""

from collections.abc import AsyncIterator
from datetime import datetime

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from gateway import values
from gateway.catalogue import Estimate, Prefetched
from gateway.content import (
    MediaPart,
    Medium,
    Message,
    Part,
    PreprocessOptions,
    TextPart,
    ToolCall,
    VideoOptions,
)
from gateway.conversations import Conversation, ConversationPage, MessagePage
from gateway.events import (
    CacheTier,
    Candidate,
    ChatEvent,
    ChatRequest,
    ChatTimings,
    ContextOverflow,
    Delta,
    Finished,
    Generated,
    GenerationConfig,
    MediaReceipt,
    RankingMethod,
    Started,
    TokenLogprob,
)
from gateway.media import StoredMedium
from gateway.prompt import Tool
from internvl_serving.common.v1 import embedding_pb2, generation_pb2
from internvl_serving.gateway.v1 import (
    batch_service_pb2,
    chat_service_pb2,
    content_pb2,
    conversation_service_pb2,
    media_service_pb2,
)
from shared.digest import checked_digest
from shared.errors import InvalidRequest, ServiceError
from shared.rpc.deadline import request_id
from shared.rpc.messages import duration_of

MAX_DIGESTS = 1000
MAX_UPLOAD_CHUNK_BYTES = 1 << 20
_OVERFLOWS = {generation_pb2.ContextOverflow.Value(f"CONTEXT_OVERFLOW_{each}"): each for each in ContextOverflow}
_RANKINGS = {chat_service_pb2.RankingMethod.Value(f"RANKING_METHOD_{method}"): method for method in RankingMethod}


# What clients send.


def chat_request(request: chat_service_pb2.ChatRequest) -> ChatRequest:
    """Return the turn to answer."""
    return ChatRequest(
        messages=tuple(_message(message, f"messages[{index}]") for index, message in enumerate(request.messages)),
        conversation_id=request.conversation_id,
        system_message=request.system_message if request.HasField("system_message") else None,
        config=_config(request.generation_config),
        return_token_ids=request.return_token_ids,
        tools=tuple(Tool(tool.name, tool.description, tool.parameters_json_schema) for tool in request.tools),
        max_total_tiles=request.max_total_tiles if request.HasField("max_total_tiles") else None,
        ranking_method=_ranking_method(request.ranking_method),
        turn_id=request.turn_id,
        keep_partial_answer=request.keep_partial_answer,
        context_overflow=_context_overflow(request.context_overflow),
    )


def new_conversation(request: conversation_service_pb2.CreateConversationRequest) -> tuple[str | None, int | None]:
    """Return the system message and the seconds to keep the conversation."""
    system_message = request.system_message if request.HasField("system_message") else None
    return system_message, request.ttl.seconds if request.HasField("ttl") else None


def fork_ttl_s(request: conversation_service_pb2.ForkConversationRequest) -> int | None:
    """Return the seconds to keep a fork; None: as long as what it comes from."""
    return request.ttl.seconds if request.HasField("ttl") else None


def digests(request: media_service_pb2.FindMissingRequest) -> list[str]:
    """Return the digests to look for."""
    if len(request.digests) > MAX_DIGESTS:
        raise InvalidRequest(f"At most {MAX_DIGESTS} digests can be asked for at once.", field="digests")
    return [checked_digest(digest, f"digests[{index}]") for index, digest in enumerate(request.digests)]


def prefetched_media(request: media_service_pb2.PrefetchRequest) -> list[Medium]:
    """Return the media whose embeddings are to be made."""
    if not 1 <= len(request.media) <= MAX_DIGESTS:
        raise InvalidRequest(f"1 to {MAX_DIGESTS} media can be asked for at once.", field="media")
    return [_medium(media, f"media[{index}]") for index, media in enumerate(request.media)]


def estimated_medium(request: media_service_pb2.EstimateRequest) -> Medium:
    """Return the picture to estimate."""
    return _medium(request.media, "media")


def deleted_digest(request: media_service_pb2.DeleteMediumRequest) -> str:
    """Return which medium is to be removed."""
    return checked_digest(request.digest, "digest")


async def upload_digest(requests: AsyncIterator[media_service_pb2.UploadRequest]) -> str:
    """Return the digest that the first message of an upload announces."""
    async for request in requests:
        if request.WhichOneof("message") == "header":
            return checked_digest(request.header.digest, "header.digest")
        break
    raise InvalidRequest("The first message of an upload is its header.", field="header")


async def upload_chunks(requests: AsyncIterator[media_service_pb2.UploadRequest]) -> AsyncIterator[bytes]:
    """Return the bytes that the messages after the header bring."""
    async for request in requests:
        if request.WhichOneof("message") != "chunk":
            raise InvalidRequest("Only chunks follow the header.", field="header")
        if len(request.chunk) > MAX_UPLOAD_CHUNK_BYTES:
            raise InvalidRequest(f"A chunk has at most {MAX_UPLOAD_CHUNK_BYTES} bytes.", field="chunk")
        yield request.chunk


def _context_overflow(number: generation_pb2.ContextOverflow.ValueType) -> ContextOverflow:
    if number not in _OVERFLOWS:
        raise InvalidRequest("There is no such way to shorten a dialogue.", field="context_overflow")
    return _OVERFLOWS[number]


def _ranking_method(number: chat_service_pb2.RankingMethod.ValueType) -> RankingMethod:
    if number not in _RANKINGS:
        raise InvalidRequest("There is no such way to rank candidates.", field="ranking_method")
    return _RANKINGS[number]


def _message(message: content_pb2.Message, field: str) -> Message:
    if message.role not in values.ROLES:
        raise InvalidRequest("A message is the user's, the assistant's or a tool's.", field=f"{field}.role")
    parts = tuple(_part(part, f"{field}.parts[{index}]") for index, part in enumerate(message.parts))
    return Message(values.ROLES[message.role], parts)


def _part(part: content_pb2.Part, field: str) -> Part:
    match part.WhichOneof("content"):
        case "text":
            return TextPart(part.text)
        case "media":
            return MediaPart((_medium(part.media, f"{field}.media"),))
        case "group" if part.group.media:
            places = (f"{field}.group.media[{index}]" for index in range(len(part.group.media)))
            return MediaPart(tuple(map(_medium, part.group.media, places)), grouped=True)
        case "group":
            raise InvalidRequest("A group has at least one picture.", field=f"{field}.group")
        case "tool_call":
            return values.tool_call_of(part.tool_call)
    raise InvalidRequest("A part is text, a picture, a video, a group of pictures or a call of a tool.", field=field)


def _medium(media: content_pb2.Media, field: str) -> Medium:
    options = PreprocessOptions(
        media.options.max_tiles if media.options.HasField("max_tiles") else None,
        media.options.thumbnail if media.options.HasField("thumbnail") else None,
        _video_options(media.options.video) if media.options.HasField("video") else None,
    )
    match media.WhichOneof("source"):
        case "inline":
            return Medium("", options, media.inline)
        case "digest":
            return Medium(checked_digest(media.digest, f"{field}.digest"), options)
    raise InvalidRequest("A medium is its bytes or the digest of bytes uploaded earlier.", field=field)


def _video_options(options: embedding_pb2.VideoOptions) -> VideoOptions:
    return VideoOptions(
        options.segment_count if options.HasField("segment_count") else None,
        options.start_seconds if options.HasField("start_seconds") else None,
        options.end_seconds if options.HasField("end_seconds") else None,
    )


def _config(config: generation_pb2.GenerationConfig) -> GenerationConfig:
    chosen = {name: getattr(config, name) for name in values.CHOICES if config.HasField(name)}  # type: ignore[arg-type]
    switched = {name: getattr(config, name) for name in values.SWITCHES}
    return GenerationConfig(stop_sequences=tuple(config.stop_sequences), **switched, **chosen)


# What clients get.


def chat_response(event: ChatEvent) -> chat_service_pb2.ChatResponse:
    """Return the event's message."""
    match event:
        case Started():
            return chat_service_pb2.ChatResponse(started=chat_started(event))
        case Delta():
            delta = chat_service_pb2.ChatDelta(
                text=event.text,
                token_ids=event.token_ids,
                candidate_index=event.candidate_index,
                logprobs=map(logprob_message, event.logprobs),
            )
            return chat_service_pb2.ChatResponse(delta=delta)
        case Finished():
            return chat_service_pb2.ChatResponse(finished=chat_finished(event))


def conversation(kept: Conversation) -> conversation_service_pb2.Conversation:
    """Return the conversation's message."""
    return conversation_service_pb2.Conversation(
        conversation_id=kept.conversation_id,
        system_message=kept.system_message,
        message_count=kept.message_count,
        create_time=timestamp(kept.create_time),
        expire_time=timestamp(kept.expire_time),
    )


def list_conversations_response(page: ConversationPage) -> conversation_service_pb2.ListConversationsResponse:
    """Return the page's message."""
    return conversation_service_pb2.ListConversationsResponse(
        conversations=map(conversation, page.conversations), next_page_token=page.next_page_token
    )


def list_messages_response(page: MessagePage) -> conversation_service_pb2.ListMessagesResponse:
    """Return the page's message."""
    return conversation_service_pb2.ListMessagesResponse(
        messages=map(_message_message, page.messages), next_page_token=page.next_page_token
    )


def upload_response(stored: StoredMedium) -> media_service_pb2.UploadResponse:
    """Return the stored medium's message."""
    return media_service_pb2.UploadResponse(
        digest=stored.digest, size_bytes=stored.size_bytes, expire_time=timestamp(stored.expire_time)
    )


def prefetch_response(prefetched: Prefetched) -> media_service_pb2.PrefetchResponse:
    """Return what became of one medium."""
    if isinstance(prefetched.outcome, MediaReceipt):
        return media_service_pb2.PrefetchResponse(index=prefetched.index, receipt=_receipt(prefetched.outcome))
    return media_service_pb2.PrefetchResponse(index=prefetched.index, error=error_message(prefetched.outcome))


def estimate_response(estimate: Estimate) -> media_service_pb2.EstimateResponse:
    """Return what a picture will take."""
    return media_service_pb2.EstimateResponse(
        width=estimate.width,
        height=estimate.height,
        columns=estimate.columns,
        rows=estimate.rows,
        tile_count=estimate.tiles,
        token_count=estimate.tokens,
    )


def chat_started(event: Started) -> chat_service_pb2.ChatStarted:
    """Return the message of an answer's beginning; its request id is the current task's."""
    return chat_service_pb2.ChatStarted(
        request_id=request_id(),
        model=event.model,
        prompt_token_count=event.prompt_token_count,
        prompt_token_ids=event.prompt_token_ids,
        dropped_turn_count=event.dropped_turns,
    )


def chat_finished(event: Finished) -> chat_service_pb2.ChatFinished:
    """Return the message of an answer's end."""
    usage = event.generated.usage
    return chat_service_pb2.ChatFinished(
        finish_reason=values.finish_reason_number(event.best.result.finish_reason),
        usage=generation_pb2.TokenUsage(
            prompt_token_count=usage.prompt_tokens,
            visual_token_count=usage.visual_tokens,
            cached_token_count=usage.cached_tokens,
            output_token_count=usage.output_tokens,
        ),
        timings=_timings(event.timings, event.generated),
        receipts=map(_receipt, event.receipts),
        message_id=event.message_id,
        candidates=map(_candidate_message, event.candidates),
        best_candidate_index=event.best_index,
        replayed=event.replayed,
    )


def _candidate_message(candidate: Candidate) -> chat_service_pb2.Candidate:
    result = candidate.result
    return chat_service_pb2.Candidate(
        finish_reason=values.finish_reason_number(result.finish_reason),
        output_token_count=result.output_tokens,
        mean_logprob=result.mean_logprob,
        tool_calls=map(values.tool_call_message, result.tool_calls),
        step_scores=candidate.step_scores,
        score=candidate.score,
    )


def logprob_message(logprob: TokenLogprob) -> generation_pb2.TokenLogprob:
    """Return the message of how likely a token was."""
    return generation_pb2.TokenLogprob(
        token_id=logprob.token_id,
        token=logprob.token,
        logprob=logprob.logprob,
        top=map(logprob_message, logprob.top),
    )


def _timings(timings: ChatTimings, generated: Generated) -> chat_service_pb2.ChatTimings:
    first_token_s = timings.time_to_first_token_s
    return chat_service_pb2.ChatTimings(
        media_duration=duration_of(timings.media_s),
        queue_duration=duration_of(generated.queue_s),
        prefill_duration=duration_of(generated.prefill_s),
        time_to_first_token=None if first_token_s is None else duration_of(first_token_s),
        decode_duration=duration_of(generated.decode_s),
        total_duration=duration_of(timings.total_s),
        output_tokens_per_second=generated.output_tokens_per_s,
    )


def _receipt(receipt: MediaReceipt) -> chat_service_pb2.MediaReceipt:
    encoded, transfer = receipt.encoded, receipt.transfer
    return chat_service_pb2.MediaReceipt(
        media_digest=receipt.media_digest,
        tile_count=encoded.handle.tile_count,
        columns=encoded.columns,
        rows=encoded.rows,
        token_count=encoded.handle.token_count,
        cache_tier=values.tier_number(encoded.cache_tier),
        coalesced=encoded.coalesced,
        preprocess_duration=duration_of(encoded.preprocess_s),
        queue_duration=duration_of(encoded.queue_s),
        encode_duration=duration_of(encoded.encode_s),
        embedding_size_bytes=encoded.size_bytes,
        transfer_tier=values.tier_number(transfer.cache_tier if transfer else CacheTier.UNSPECIFIED),
        transfer_duration=duration_of(transfer.duration_s if transfer else 0.0),
        transfer_size_bytes=transfer.size_bytes if transfer else 0,
        frames=[embedding_pb2.VideoFrame(index=frame.index, time_seconds=frame.time_s) for frame in encoded.frames],
    )


def _message_message(message: Message) -> content_pb2.Message:
    return content_pb2.Message(
        role=values.ROLE_NUMBERS[message.role],
        parts=map(_part_message, message.parts),
        message_id=message.message_id,
        create_time=timestamp(message.create_time) if message.create_time else None,
        cut_off=message.cut_off,
    )


def _part_message(part: Part) -> content_pb2.Part:
    if isinstance(part, TextPart):
        return content_pb2.Part(text=part.text)
    if isinstance(part, ToolCall):
        return content_pb2.Part(tool_call=values.tool_call_message(part))
    media = [
        content_pb2.Media(digest=medium.digest, options=values.options_message(medium.options)) for medium in part.media
    ]
    return (
        content_pb2.Part(group=content_pb2.MediaGroup(media=media))
        if part.grouped
        else content_pb2.Part(media=media[0])
    )


def error_message(error: ServiceError) -> batch_service_pb2.BatchError:
    """Return an error that is one of many outcomes and not that of the call."""
    code: int = grpc.StatusCode[error.code.value].value[0]
    return batch_service_pb2.BatchError(
        code=code, reason=error.reason, message=error.message, field=error.field or "", resource=error.resource or ""
    )


def timestamp(time: datetime) -> Timestamp:
    """Return the time as a message."""
    made = Timestamp()
    made.FromDatetime(time)
    return made
