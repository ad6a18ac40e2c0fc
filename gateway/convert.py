"""Between the generated messages and the gateway's own types, both ways; what is malformed raises here."""

from collections.abc import AsyncIterator
from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp

from gateway.content import MediaPart, Medium, Message, Part, PreprocessOptions, Role, TextPart
from gateway.conversations import Conversation, MessagePage
from gateway.events import (
    CacheTier,
    ChatEvent,
    ChatRequest,
    ChatTimings,
    Delta,
    Encoded,
    Finished,
    FinishReason,
    Generated,
    GenerateEvent,
    GenerateRequest,
    GenerationConfig,
    MediaReceipt,
    Started,
    TokenUsage,
    Transfer,
)
from gateway.media import StoredMedium
from gateway.prompt import EmbeddingHandle, Segment, TextSegment, Turn
from internvl_serving.common.v1 import embedding_pb2, generation_pb2
from internvl_serving.gateway.v1 import chat_service_pb2, content_pb2, conversation_service_pb2, media_service_pb2
from internvl_serving.llm.v1 import llm_service_pb2
from internvl_serving.vision.v1 import vision_service_pb2
from shared.digest import checked_digest
from shared.errors import InvalidRequest
from shared.rpc.deadline import request_id
from shared.rpc.messages import duration_of, seconds_of

MAX_DIGESTS = 1000
MAX_UPLOAD_CHUNK_BYTES = 1 << 20
_ROLES = {generation_pb2.ROLE_USER: Role.USER, generation_pb2.ROLE_ASSISTANT: Role.ASSISTANT}
_ROLE_NUMBERS = {role: number for number, role in _ROLES.items()}
_TIERS = {embedding_pb2.CacheTier.Value(f"CACHE_TIER_{tier}"): tier for tier in CacheTier}
_FINISH_REASONS = {generation_pb2.FinishReason.Value(f"FINISH_REASON_{reason}"): reason for reason in FinishReason}
_CHOICES = (
    "max_output_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "num_beams",
)


# What clients send.


def chat_request(request: chat_service_pb2.ChatRequest) -> ChatRequest:
    """Return the turn to answer."""
    return ChatRequest(
        messages=tuple(_message(message, f"messages[{index}]") for index, message in enumerate(request.messages)),
        conversation_id=request.conversation_id,
        system_message=request.system_message if request.HasField("system_message") else None,
        config=_config(request.generation_config),
        return_token_ids=request.return_token_ids,
    )


def new_conversation(request: conversation_service_pb2.CreateConversationRequest) -> tuple[str | None, int | None]:
    """Return the system message and the seconds to keep the conversation."""
    system_message = request.system_message if request.HasField("system_message") else None
    return system_message, request.ttl.seconds if request.HasField("ttl") else None


def digests(request: media_service_pb2.FindMissingRequest) -> list[str]:
    """Return the digests to look for."""
    if len(request.digests) > MAX_DIGESTS:
        raise InvalidRequest(f"At most {MAX_DIGESTS} digests can be asked for at once.", field="digests")
    return [checked_digest(digest, f"digests[{index}]") for index, digest in enumerate(request.digests)]


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


def _message(message: content_pb2.Message, field: str) -> Message:
    if message.role not in _ROLES:
        raise InvalidRequest("A message is the user's or the assistant's.", field=f"{field}.role")
    parts = tuple(_part(part, f"{field}.parts[{index}]") for index, part in enumerate(message.parts))
    return Message(_ROLES[message.role], parts)


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
    raise InvalidRequest("A part is text, a picture or a group of pictures.", field=field)


def _medium(media: content_pb2.Media, field: str) -> Medium:
    options = PreprocessOptions(
        media.options.max_tiles if media.options.HasField("max_tiles") else None,
        media.options.thumbnail if media.options.HasField("thumbnail") else None,
    )
    match media.WhichOneof("source"):
        case "inline":
            return Medium("", options, media.inline)
        case "digest":
            return Medium(checked_digest(media.digest, f"{field}.digest"), options)
    raise InvalidRequest("A picture is its bytes or the digest of bytes uploaded earlier.", field=field)


def _config(config: generation_pb2.GenerationConfig) -> GenerationConfig:
    chosen = {name: getattr(config, name) for name in _CHOICES if config.HasField(name)}  # type: ignore[arg-type]
    return GenerationConfig(stop_sequences=tuple(config.stop_sequences), ignore_end=config.ignore_end, **chosen)


# What clients get.


def chat_response(event: ChatEvent) -> chat_service_pb2.ChatResponse:
    """Return the event's message."""
    match event:
        case Started():
            return chat_service_pb2.ChatResponse(
                started=chat_service_pb2.ChatStarted(
                    request_id=request_id(),
                    model=event.model,
                    prompt_token_count=event.prompt_token_count,
                    prompt_token_ids=event.prompt_token_ids,
                )
            )
        case Delta():
            delta = chat_service_pb2.ChatDelta(text=event.text, token_ids=event.token_ids)
            return chat_service_pb2.ChatResponse(delta=delta)
        case Finished():
            return chat_service_pb2.ChatResponse(finished=_chat_finished(event))


def conversation(kept: Conversation) -> conversation_service_pb2.Conversation:
    """Return the conversation's message."""
    return conversation_service_pb2.Conversation(
        conversation_id=kept.conversation_id,
        system_message=kept.system_message,
        message_count=kept.message_count,
        create_time=_timestamp(kept.create_time),
        expire_time=_timestamp(kept.expire_time),
    )


def list_messages_response(page: MessagePage) -> conversation_service_pb2.ListMessagesResponse:
    """Return the page's message."""
    return conversation_service_pb2.ListMessagesResponse(
        messages=map(_message_message, page.messages), next_page_token=page.next_page_token
    )


def upload_response(stored: StoredMedium) -> media_service_pb2.UploadResponse:
    """Return the stored medium's message."""
    return media_service_pb2.UploadResponse(
        digest=stored.digest, size_bytes=stored.size_bytes, expire_time=_timestamp(stored.expire_time)
    )


def _chat_finished(event: Finished) -> chat_service_pb2.ChatFinished:
    usage = event.generated.usage
    return chat_service_pb2.ChatFinished(
        finish_reason=generation_pb2.FinishReason.Value(f"FINISH_REASON_{event.generated.finish_reason}"),
        usage=generation_pb2.TokenUsage(
            prompt_token_count=usage.prompt_tokens,
            visual_token_count=usage.visual_tokens,
            cached_token_count=usage.cached_tokens,
            output_token_count=usage.output_tokens,
        ),
        timings=_timings(event.timings, event.generated),
        receipts=map(_receipt, event.receipts),
        message_id=event.message_id,
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
    )


def _receipt(receipt: MediaReceipt) -> chat_service_pb2.MediaReceipt:
    encoded, transfer = receipt.encoded, receipt.transfer
    return chat_service_pb2.MediaReceipt(
        media_digest=receipt.media_digest,
        tile_count=encoded.handle.tile_count,
        columns=encoded.columns,
        rows=encoded.rows,
        token_count=encoded.handle.token_count,
        cache_tier=_tier_number(encoded.cache_tier),
        coalesced=encoded.coalesced,
        preprocess_duration=duration_of(encoded.preprocess_s),
        encode_duration=duration_of(encoded.encode_s),
        transfer_tier=_tier_number(transfer.cache_tier if transfer else CacheTier.UNSPECIFIED),
        transfer_duration=duration_of(transfer.duration_s if transfer else 0.0),
    )


def _message_message(message: Message) -> content_pb2.Message:
    return content_pb2.Message(
        role=_ROLE_NUMBERS[message.role],
        parts=map(_part_message, message.parts),
        message_id=message.message_id,
        create_time=_timestamp(message.create_time) if message.create_time else None,
    )


def _part_message(part: Part) -> content_pb2.Part:
    if isinstance(part, TextPart):
        return content_pb2.Part(text=part.text)
    media = [content_pb2.Media(digest=medium.digest, options=_options(medium.options)) for medium in part.media]
    return (
        content_pb2.Part(group=content_pb2.MediaGroup(media=media))
        if part.grouped
        else content_pb2.Part(media=media[0])
    )


# What the stages get.


def encode_header(medium: Medium) -> vision_service_pb2.EncodeHeader:
    """Return the header that asks for the medium's embedding."""
    return vision_service_pb2.EncodeHeader(media_digest=medium.digest, options=_options(medium.options))


def generate_request(request: GenerateRequest) -> llm_service_pb2.GenerateRequest:
    """Return the prompt's message."""
    config = request.config
    chosen = {name: getattr(config, name) for name in _CHOICES}
    return llm_service_pb2.GenerateRequest(
        prompt=llm_service_pb2.Prompt(
            system_message=request.prompt.system_message, turns=map(_turn_message, request.prompt.turns)
        ),
        generation_config=generation_pb2.GenerationConfig(
            stop_sequences=config.stop_sequences, ignore_end=config.ignore_end, **chosen
        ),
        return_token_ids=request.return_token_ids,
    )


def _turn_message(turn: Turn) -> llm_service_pb2.Turn:
    return llm_service_pb2.Turn(role=_ROLE_NUMBERS[turn.role], segments=map(_segment_message, turn.segments))


def _segment_message(segment: Segment) -> llm_service_pb2.Segment:
    if isinstance(segment, TextSegment):
        return llm_service_pb2.Segment(text=segment.text)
    handles = (embedding_pb2.EmbeddingHandle.FromString(handle.message) for handle in segment.handles)
    return llm_service_pb2.Segment(visual=llm_service_pb2.VisualSegment(embeddings=handles))


def _options(options: PreprocessOptions) -> embedding_pb2.PreprocessOptions:
    return embedding_pb2.PreprocessOptions(max_tiles=options.max_tiles, thumbnail=options.thumbnail)


# What the stages answer.


def encoded(response: vision_service_pb2.EncodeResponse) -> Encoded:
    """Return what the vision service said about a medium."""
    handle = response.handle
    return Encoded(
        handle=EmbeddingHandle(handle.digest, handle.tile_count, handle.token_count, handle.SerializeToString()),
        cache_tier=_tier(response.cache_tier),
        columns=response.columns,
        rows=response.rows,
        coalesced=response.coalesced,
        preprocess_s=seconds_of(response.preprocess_duration),
        encode_s=seconds_of(response.encode_duration),
    )


def generate_event(response: llm_service_pb2.GenerateResponse) -> GenerateEvent | None:
    """Return the event of an answer; None for one that only newer gateways know."""
    match response.WhichOneof("event"):
        case "started":
            started = response.started
            return Started(started.model, started.prompt_token_count, tuple(started.prompt_token_ids))
        case "delta":
            return Delta(response.delta.text, tuple(response.delta.token_ids))
        case "finished":
            return _generated(response.finished)
    return None


def _generated(finished: llm_service_pb2.GenerateFinished) -> Generated:
    usage = finished.usage
    return Generated(
        finish_reason=_FINISH_REASONS.get(finished.finish_reason, FinishReason.UNSPECIFIED),
        usage=TokenUsage(
            prompt_tokens=usage.prompt_token_count,
            visual_tokens=usage.visual_token_count,
            cached_tokens=usage.cached_token_count,
            output_tokens=usage.output_token_count,
        ),
        queue_s=seconds_of(finished.queue_duration),
        prefill_s=seconds_of(finished.prefill_duration),
        decode_s=seconds_of(finished.decode_duration),
        transfers=tuple(
            Transfer(transfer.digest, _tier(transfer.cache_tier), seconds_of(transfer.duration))
            for transfer in finished.transfers
        ),
    )


# Small values.


def _tier(number: embedding_pb2.CacheTier.ValueType) -> CacheTier:
    return _TIERS.get(number, CacheTier.UNSPECIFIED)


def _tier_number(tier: CacheTier) -> embedding_pb2.CacheTier.ValueType:
    return embedding_pb2.CacheTier.Value(f"CACHE_TIER_{tier}")


def _timestamp(time: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(time)
    return timestamp
