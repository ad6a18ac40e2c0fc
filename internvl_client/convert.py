"""Turns the client's types into generated messages and back. Generated messages appear nowhere above this module."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from internvl_client.content import Image, ImageGroup, Media, Message, Part, Role, Tool, ToolCall, Video
from internvl_client.types import (
    Answer,
    CacheTier,
    Candidate,
    ChatEvent,
    ContextOverflow,
    ConversationInfo,
    Delta,
    Finished,
    FinishReason,
    GenerationConfig,
    RankingMethod,
    Receipt,
    Started,
    Timings,
    TokenLogprob,
    TurnOptions,
    UploadedMedia,
    Usage,
    VideoFrame,
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
    """Return the request for an answer; media whose digest is in `inline` carry their bytes."""
    return chat_service_pb2.ChatRequest(
        conversation_id=conversation_id,
        messages=[_message(message, inline) for message in messages],
        system_message=system_message,
        generation_config=_generation_config(options),
        return_token_ids=options.get("return_token_ids", False),
        tools=[_tool(tool) for tool in options.get("tools", ())],
        max_total_tiles=options.get("max_total_tiles"),
        ranking_method=chat_service_pb2.RankingMethod.Value(
            f"RANKING_METHOD_{options.get('ranking_method', RankingMethod.UNSPECIFIED)}"
        ),
        turn_id=options.get("turn_id") or (uuid.uuid4().hex if conversation_id else ""),
        keep_partial_answer=options.get("keep_partial_answer", False),
        context_overflow=generation_pb2.ContextOverflow.Value(
            f"CONTEXT_OVERFLOW_{options.get('context_overflow', ContextOverflow.UNSPECIFIED)}"
        ),
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
    return conversation_service_pb2.CreateConversationRequest(system_message=system_message, ttl=duration(ttl_s))


def fork_conversation_request(
    conversation_id: str, at: Message | Answer | str | None, ttl_s: float | None
) -> conversation_service_pb2.ForkConversationRequest:
    """Return the request for a fork; raise `ValueError` for a message that no conversation keeps."""
    message_id = at if isinstance(at, str) else at.message_id if at else None
    if message_id == "":
        raise ValueError("A conversation is forked at an answer that it keeps: this one has no message_id.")
    return conversation_service_pb2.ForkConversationRequest(
        conversation_id=conversation_id, message_id=message_id or "", ttl=duration(ttl_s)
    )


def event_of(response: chat_service_pb2.ChatResponse) -> ChatEvent | None:
    """Return the event; None for one that this version of the client does not know."""
    match response.WhichOneof("event"):
        case "started":
            return started_of(response.started)
        case "delta":
            delta = response.delta
            return Delta(delta.text, tuple(delta.token_ids), delta.candidate_index, logprobs_of(delta.logprobs))
        case "finished":
            return finished_of(response.finished)
    return None


def conversation_of(conversation: conversation_service_pb2.Conversation) -> ConversationInfo:
    """Return what is known of a conversation."""
    return ConversationInfo(
        conversation.conversation_id,
        conversation.system_message if conversation.HasField("system_message") else None,
        conversation.message_count,
        time_of(conversation.create_time),
        time_of(conversation.expire_time),
    )


def message_of(message: content_pb2.Message) -> Message:
    """Return a stored message; its media are digests."""
    return Message(
        _ROLES.get(message.role, Role.UNSPECIFIED),
        tuple(_part_of(part) for part in message.parts),
        message.message_id,
        time_of(message.create_time) if message.HasField("create_time") else None,
        message.cut_off,
    )


def uploaded_of(response: media_service_pb2.UploadResponse) -> UploadedMedia:
    """Return what the server says of an upload."""
    return UploadedMedia(response.digest, response.size_bytes, time_of(response.expire_time))


def duration(seconds: float | None) -> Duration | None:
    """Return the time as a message."""
    if seconds is None:
        return None
    made = Duration()
    made.FromMilliseconds(round(seconds * 1000))
    return made


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
    if isinstance(part, ToolCall):
        return content_pb2.Part(
            tool_call=generation_pb2.ToolCall(
                name=part.name, arguments_json=part.arguments_json, tool_call_id=part.tool_call_id
            )
        )
    return content_pb2.Part(media=_media(part, inline))


def media_message(medium: Media, content: bytes | None) -> content_pb2.Media:
    """Return the message that brings `content`, or else names the medium by its digest."""
    options = embedding_pb2.PreprocessOptions(
        max_tiles=medium.max_tiles,
        thumbnail=medium.thumbnail,
        video=embedding_pb2.VideoOptions(
            segment_count=medium.num_segments, start_seconds=medium.start_s, end_seconds=medium.end_s
        )
        if isinstance(medium, Video)
        else None,
    )
    if content is not None:
        return content_pb2.Media(inline=content, options=options)
    return content_pb2.Media(digest=medium.digest, options=options)


def _media(medium: Media, inline: frozenset[str]) -> content_pb2.Media:
    return media_message(medium, medium.content if medium.digest in inline else None)


def _tool(tool: Tool) -> generation_pb2.Tool:
    return generation_pb2.Tool(
        name=tool.name, description=tool.description, parameters_json_schema=_json_text(tool.parameters or "")
    )


def _json_text(schema: str | Mapping[str, Any]) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema)


def _generation_config(options: TurnOptions) -> generation_pb2.GenerationConfig:
    given: Mapping[str, object] = options
    changes = {name: value for name, value in given.items() if name in _GENERATION_FIELDS}
    config = dataclasses.replace(options.get("config", GenerationConfig()), **changes)  # type: ignore[arg-type]
    fields = {name: getattr(config, name) for name in _GENERATION_FIELDS}
    return generation_pb2.GenerationConfig(**fields | {"json_schema": _json_text(config.json_schema)})


def started_of(started: chat_service_pb2.ChatStarted) -> Started:
    """Return the beginning of an answer."""
    return Started(
        started.request_id,
        started.model,
        started.prompt_token_count,
        tuple(started.prompt_token_ids),
        started.dropped_turn_count,
    )


def logprobs_of(logprobs: Iterable[generation_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    """Return how likely tokens were."""
    return tuple(map(_logprob_of, logprobs))


def finished_of(finished: chat_service_pb2.ChatFinished) -> Finished:
    """Return the end of an answer."""
    usage = finished.usage
    return Finished(
        _FINISH_REASONS.get(finished.finish_reason, FinishReason.UNSPECIFIED),
        Usage(usage.prompt_token_count, usage.visual_token_count, usage.cached_token_count, usage.output_token_count),
        _timings(finished.timings),
        tuple(map(receipt_of, finished.receipts)),
        finished.message_id,
        tuple(map(_candidate_of, finished.candidates)),
        finished.best_candidate_index,
        finished.replayed,
    )


def _candidate_of(candidate: chat_service_pb2.Candidate) -> Candidate:
    return Candidate(
        finish_reason=_FINISH_REASONS.get(candidate.finish_reason, FinishReason.UNSPECIFIED),
        num_output_tokens=candidate.output_token_count,
        tool_calls=tuple(map(_tool_call_of, candidate.tool_calls)),
        mean_logprob=candidate.mean_logprob,
        score=candidate.score,
        step_scores=tuple(candidate.step_scores),
    )


def _tool_call_of(call: generation_pb2.ToolCall) -> ToolCall:
    return ToolCall(call.name, call.arguments_json, call.tool_call_id)


def _logprob_of(logprob: generation_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(logprob.token_id, logprob.token, logprob.logprob, logprobs_of(logprob.top))


def _timings(timings: chat_service_pb2.ChatTimings) -> Timings:
    return Timings(
        media_s=_seconds(timings.media_duration),
        queue_s=_seconds(timings.queue_duration),
        prefill_s=_seconds(timings.prefill_duration),
        time_to_first_token_s=_seconds(timings.time_to_first_token),
        decode_s=_seconds(timings.decode_duration),
        total_s=_seconds(timings.total_duration),
    )


def receipt_of(receipt: chat_service_pb2.MediaReceipt) -> Receipt:
    """Return what a medium cost."""
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
        frames=tuple(VideoFrame(frame.index, frame.time_seconds) for frame in receipt.frames),
        queue_s=_seconds(receipt.queue_duration),
        embedding_bytes=receipt.embedding_size_bytes,
        transfer_bytes=receipt.transfer_size_bytes,
    )


def _part_of(part: content_pb2.Part) -> Part:
    match part.WhichOneof("content"):
        case "media":
            return _medium_of(part.media)
        case "tool_call":
            return _tool_call_of(part.tool_call)
        case "group":
            return ImageGroup(tuple(_image_of(media) for media in part.group.media))
    return part.text


def _medium_of(media: content_pb2.Media) -> Media:
    image = _image_of(media)
    if not media.options.HasField("video"):
        return image
    video = media.options.video
    return Video(
        image.digest,
        image.content,
        video.segment_count if video.HasField("segment_count") else None,
        video.start_seconds if video.HasField("start_seconds") else None,
        video.end_seconds if video.HasField("end_seconds") else None,
        image.max_tiles,
        image.thumbnail,
    )


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


def time_of(timestamp: Timestamp) -> datetime:
    """Return the time that a message tells, with its zone."""
    return timestamp.ToDatetime(tzinfo=UTC)
