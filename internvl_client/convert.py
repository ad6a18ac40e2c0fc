"""Turns the client's types into generated messages and back. Generated messages appear nowhere above this module."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from internvl_client.types import (
    CacheTier,
    ChatEvent,
    ConversationInfo,
    Delta,
    Finished,
    FinishReason,
    GenerationConfig,
    Image,
    ImageGroup,
    Message,
    Part,
    Receipt,
    Role,
    Started,
    Timings,
    TurnOptions,
    UploadedMedia,
    Usage,
)
from internvl_serving.common.v1 import embedding_pb2, generation_pb2
from internvl_serving.gateway.v1 import (
    chat_service_pb2,
    content_pb2,
    conversation_service_pb2,
    media_service_pb2,
)

CHUNK_BYTES = 1 << 20
_GENERATION_FIELDS = frozenset(field.name for field in dataclasses.fields(GenerationConfig))
# Values that are newer than this client are UNSPECIFIED.
_ROLES = {int(generation_pb2.Role.Value(f"ROLE_{role}")): role for role in Role}
_FINISH_REASONS = {int(generation_pb2.FinishReason.Value(f"FINISH_REASON_{reason}")): reason for reason in FinishReason}
_TIERS = {int(embedding_pb2.CacheTier.Value(f"CACHE_TIER_{tier}")): tier for tier in CacheTier}


def chat_request(
    messages: Sequence[Message],
    inline: frozenset[str],
    options: TurnOptions,
    system_message: str | None,
    conversation_id: str,
) -> chat_service_pb2.ChatRequest:
    """Return the request for an answer; pictures whose digest is in `inline` carry their bytes."""
    return chat_service_pb2.ChatRequest(
        conversation_id=conversation_id,
        messages=[_message(message, inline) for message in messages],
        system_message=system_message,
        generation_config=_generation_config(options),
        return_token_ids=options.get("return_token_ids", False),
    )


def dialogue_of(content: Iterable[Message | Part]) -> list[Message]:
    """Return the messages that `content` means: neighbouring bare parts make one user message."""
    messages: list[Message] = []
    parts: list[Part] = []
    for item in content:
        if isinstance(item, Message):
            messages += [Message.user(*parts)] if parts else []
            messages.append(item)
            parts = []
        else:
            parts.append(item)
    return [*messages, Message.user(*parts)] if parts or not messages else messages


def upload_requests(digest: str, content: bytes) -> Iterator[media_service_pb2.UploadRequest]:
    """Yield the messages that upload `content`: its header, then its chunks."""
    yield media_service_pb2.UploadRequest(header=media_service_pb2.UploadHeader(digest=digest))
    view = memoryview(content)
    for start in range(0, len(content), CHUNK_BYTES):
        yield media_service_pb2.UploadRequest(chunk=bytes(view[start : start + CHUNK_BYTES]))


def create_conversation_request(
    system_message: str | None, ttl_s: float | None
) -> conversation_service_pb2.CreateConversationRequest:
    """Return the request for a new conversation."""
    ttl = None
    if ttl_s is not None:
        ttl = Duration()
        ttl.FromMilliseconds(round(ttl_s * 1000))
    return conversation_service_pb2.CreateConversationRequest(system_message=system_message, ttl=ttl)


def event_of(response: chat_service_pb2.ChatResponse) -> ChatEvent | None:
    """Return the event; None for one that this version of the client does not know."""
    match response.WhichOneof("event"):
        case "started":
            started = response.started
            return Started(
                started.request_id, started.model, started.prompt_token_count, tuple(started.prompt_token_ids)
            )
        case "delta":
            return Delta(response.delta.text, tuple(response.delta.token_ids))
        case "finished":
            return _finished(response.finished)
    return None


def conversation_of(conversation: conversation_service_pb2.Conversation) -> ConversationInfo:
    """Return what is known of a conversation."""
    return ConversationInfo(
        conversation.conversation_id,
        conversation.system_message if conversation.HasField("system_message") else None,
        conversation.message_count,
        _time(conversation.create_time),
        _time(conversation.expire_time),
    )


def message_of(message: content_pb2.Message) -> Message:
    """Return a stored message; its pictures are digests."""
    return Message(
        _ROLES.get(message.role, Role.UNSPECIFIED),
        tuple(_part_of(part) for part in message.parts),
        message.message_id,
        _time(message.create_time) if message.HasField("create_time") else None,
    )


def uploaded_of(response: media_service_pb2.UploadResponse) -> UploadedMedia:
    """Return what the server says of an upload."""
    return UploadedMedia(response.digest, response.size_bytes, _time(response.expire_time))


def _message(message: Message, inline: frozenset[str]) -> content_pb2.Message:
    return content_pb2.Message(
        role=generation_pb2.Role.Value(f"ROLE_{message.role}"),
        parts=[_part(part, inline) for part in message.parts],
    )


def _part(part: Part, inline: frozenset[str]) -> content_pb2.Part:
    if isinstance(part, str):
        return content_pb2.Part(text=part)
    if isinstance(part, ImageGroup):
        return content_pb2.Part(group=content_pb2.MediaGroup(media=[_media(image, inline) for image in part.images]))
    return content_pb2.Part(media=_media(part, inline))


def _media(image: Image, inline: frozenset[str]) -> content_pb2.Media:
    options = embedding_pb2.PreprocessOptions(max_tiles=image.max_tiles, thumbnail=image.thumbnail)
    if image.content is not None and image.digest in inline:
        return content_pb2.Media(inline=image.content, options=options)
    return content_pb2.Media(digest=image.digest, options=options)


def _generation_config(options: TurnOptions) -> generation_pb2.GenerationConfig:
    given: Mapping[str, object] = options
    changes = {name: value for name, value in given.items() if name in _GENERATION_FIELDS}
    config = dataclasses.replace(options.get("config", GenerationConfig()), **changes)  # type: ignore[arg-type]
    return generation_pb2.GenerationConfig(**{name: getattr(config, name) for name in _GENERATION_FIELDS})


def _finished(finished: chat_service_pb2.ChatFinished) -> Finished:
    usage = finished.usage
    return Finished(
        _FINISH_REASONS.get(finished.finish_reason, FinishReason.UNSPECIFIED),
        Usage(usage.prompt_token_count, usage.visual_token_count, usage.cached_token_count, usage.output_token_count),
        _timings(finished.timings),
        tuple(_receipt(receipt) for receipt in finished.receipts),
        finished.message_id,
    )


def _timings(timings: chat_service_pb2.ChatTimings) -> Timings:
    return Timings(
        media_s=_seconds(timings.media_duration),
        queue_s=_seconds(timings.queue_duration),
        prefill_s=_seconds(timings.prefill_duration),
        time_to_first_token_s=_seconds(timings.time_to_first_token),
        decode_s=_seconds(timings.decode_duration),
        total_s=_seconds(timings.total_duration),
    )


def _receipt(receipt: chat_service_pb2.MediaReceipt) -> Receipt:
    return Receipt(
        media_digest=receipt.media_digest,
        num_tiles=receipt.tile_count,
        columns=receipt.columns,
        rows=receipt.rows,
        num_tokens=receipt.token_count,
        cache_tier=_tier(receipt.cache_tier),
        coalesced=receipt.coalesced,
        preprocess_s=_seconds(receipt.preprocess_duration),
        encode_s=_seconds(receipt.encode_duration),
        transfer_tier=_tier(receipt.transfer_tier),
        transfer_s=_seconds(receipt.transfer_duration),
    )


def _part_of(part: content_pb2.Part) -> Part:
    match part.WhichOneof("content"):
        case "media":
            return _image_of(part.media)
        case "group":
            return ImageGroup(tuple(_image_of(media) for media in part.group.media))
    return part.text


def _image_of(media: content_pb2.Media) -> Image:
    options = media.options
    max_tiles = options.max_tiles if options.HasField("max_tiles") else None
    thumbnail = options.thumbnail if options.HasField("thumbnail") else None
    if media.WhichOneof("source") == "inline":
        return Image.from_bytes(media.inline, max_tiles=max_tiles, thumbnail=thumbnail)
    return Image.from_digest(media.digest, max_tiles=max_tiles, thumbnail=thumbnail)


def _tier(number: int) -> CacheTier:
    return _TIERS.get(number, CacheTier.UNSPECIFIED)


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _time(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(tzinfo=UTC)
