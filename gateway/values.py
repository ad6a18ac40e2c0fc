"""Values that are the same in the messages of clients and of the stages, both ways."""

from gateway.content import PreprocessOptions, Role, ToolCall
from gateway.events import CacheTier, FinishReason
from internvl_serving.common.v1 import embedding_pb2, generation_pb2

ROLES = {
    generation_pb2.ROLE_USER: Role.USER,
    generation_pb2.ROLE_ASSISTANT: Role.ASSISTANT,
    generation_pb2.ROLE_TOOL: Role.TOOL,
}
ROLE_NUMBERS = {role: number for number, role in ROLES.items()}
# Fields of GenerationConfig: those that may be absent, and those that are off by default.
CHOICES = (
    "max_output_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "num_beams",
    "candidate_count",
    "top_logprobs",
    "visual_position_stride",
)
SWITCHES = ("ignore_end", "json_schema", "grounding", "include_special_tokens")
_TIERS = {embedding_pb2.CacheTier.Value(f"CACHE_TIER_{tier}"): tier for tier in CacheTier}
_FINISH_REASONS = {generation_pb2.FinishReason.Value(f"FINISH_REASON_{reason}"): reason for reason in FinishReason}


def tier_of(number: embedding_pb2.CacheTier.ValueType) -> CacheTier:
    """Return the tier; one that only newer services know is unspecified."""
    return _TIERS.get(number, CacheTier.UNSPECIFIED)


def tier_number(tier: CacheTier) -> embedding_pb2.CacheTier.ValueType:
    """Return the tier's number."""
    return embedding_pb2.CacheTier.Value(f"CACHE_TIER_{tier}")


def finish_reason_of(number: generation_pb2.FinishReason.ValueType) -> FinishReason:
    """Return the reason; one that only newer services know is unspecified."""
    return _FINISH_REASONS.get(number, FinishReason.UNSPECIFIED)


def finish_reason_number(reason: FinishReason) -> generation_pb2.FinishReason.ValueType:
    """Return the reason's number."""
    return generation_pb2.FinishReason.Value(f"FINISH_REASON_{reason}")


def tool_call_of(call: generation_pb2.ToolCall) -> ToolCall:
    """Return the call of a tool."""
    return ToolCall(call.name, call.arguments_json, call.tool_call_id)


def tool_call_message(call: ToolCall) -> generation_pb2.ToolCall:
    """Return the call's message."""
    return generation_pb2.ToolCall(name=call.name, arguments_json=call.arguments_json, tool_call_id=call.tool_call_id)


def options_message(options: PreprocessOptions) -> embedding_pb2.PreprocessOptions:
    """Return the options' message."""
    video = options.video
    return embedding_pb2.PreprocessOptions(
        max_tiles=options.max_tiles,
        thumbnail=options.thumbnail,
        video=None
        if video is None
        else embedding_pb2.VideoOptions(
            segment_count=video.segment_count, start_seconds=video.start_s, end_seconds=video.end_s
        ),
    )
