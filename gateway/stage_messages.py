"""Between the stages' messages and the gateway's own types: what the vision and LLM services get and answer."""

from collections.abc import Sequence

from gateway import values
from gateway.caller import current_caller
from gateway.catalogue import Estimate
from gateway.content import Medium, PreprocessOptions, ToolCall
from gateway.events import (
    CandidateResult,
    Delta,
    Encoded,
    Generated,
    GenerateEvent,
    GenerateRequest,
    Started,
    TokenLogprob,
    TokenUsage,
    Transfer,
    VideoFrame,
)
from gateway.prompt import EmbeddingHandle, Prompt, Segment, TextSegment, Turn, VisualSegment
from internvl_serving.common.v1 import embedding_pb2, generation_pb2
from internvl_serving.llm.v1 import llm_service_pb2
from internvl_serving.vision.v1 import vision_service_pb2
from shared.embedding import row_bytes_of
from shared.rpc.messages import DATA_TYPE_OF_MESSAGE, seconds_of

# What the stages get.


def encode_header(medium: Medium, *, prefetch: bool) -> vision_service_pb2.EncodeHeader:
    """Return the header that asks for the medium's embedding, the current caller's own or, without one, everybody's."""
    return vision_service_pb2.EncodeHeader(
        media_digest=medium.digest,
        options=values.options_message(medium.options),
        tenant=current_caller().embedding_tenant,
        prefetch=prefetch,
    )


def erase_request(media_digest: str) -> vision_service_pb2.EraseRequest:
    """Return the message that has the medium's embeddings removed, the current caller's own or everybody's."""
    return vision_service_pb2.EraseRequest(tenant=current_caller().embedding_tenant, media_digest=media_digest)


def estimate_request(content: bytes, options: PreprocessOptions) -> vision_service_pb2.EstimateRequest:
    """Return the message that asks what a picture will take."""
    return vision_service_pb2.EstimateRequest(content=content, options=values.options_message(options))


def generate_request(request: GenerateRequest) -> llm_service_pb2.GenerateRequest:
    """Return the prompt's message."""
    config = request.config
    chosen = {name: getattr(config, name) for name in (*values.CHOICES, *values.SWITCHES)}
    return llm_service_pb2.GenerateRequest(
        prompt=_prompt_message(request.prompt),
        generation_config=generation_pb2.GenerationConfig(stop_sequences=config.stop_sequences, **chosen),
        return_token_ids=request.return_token_ids,
        priority=generation_pb2.PRIORITY_BACKGROUND if request.in_background else generation_pb2.PRIORITY_INTERACTIVE,
        context_overflow=generation_pb2.ContextOverflow.Value(f"CONTEXT_OVERFLOW_{request.context_overflow}"),
    )


def count_tokens_request(prompt: Prompt | str) -> llm_service_pb2.CountTokensRequest:
    """Return the request for the tokens of a prompt, or of plain text."""
    if isinstance(prompt, str):
        return llm_service_pb2.CountTokensRequest(text=prompt, return_token_ids=True)
    return llm_service_pb2.CountTokensRequest(prompt=_prompt_message(prompt), return_token_ids=True)


def score_turns_request(prompt: Prompt, choices: Sequence[str]) -> llm_service_pb2.ScoreTurnsRequest:
    """Return the message that asks how likely each choice is at each turn of the model's."""
    return llm_service_pb2.ScoreTurnsRequest(prompt=_prompt_message(prompt), choices=choices)


def _prompt_message(prompt: Prompt) -> llm_service_pb2.Prompt:
    return llm_service_pb2.Prompt(
        system_message=prompt.system_message,
        turns=map(_turn_message, prompt.turns),
        tools=[
            generation_pb2.Tool(
                name=tool.name, description=tool.description, parameters_json_schema=tool.parameters_json_schema
            )
            for tool in prompt.tools
        ],
        tenant=current_caller().embedding_tenant,
    )


def _turn_message(turn: Turn) -> llm_service_pb2.Turn:
    return llm_service_pb2.Turn(role=values.ROLE_NUMBERS[turn.role], segments=map(_segment_message, turn.segments))


def _segment_message(segment: Segment) -> llm_service_pb2.Segment:
    match segment:
        case TextSegment():
            return llm_service_pb2.Segment(text=segment.text)
        case ToolCall():
            return llm_service_pb2.Segment(tool_call=values.tool_call_message(segment))
        case VisualSegment():
            handles = (embedding_pb2.EmbeddingHandle.FromString(handle.message) for handle in segment.handles)
            return llm_service_pb2.Segment(
                visual=llm_service_pb2.VisualSegment(embeddings=handles, frame=segment.frame)
            )


# What the stages answer.


def encoded(response: vision_service_pb2.EncodeResponse) -> Encoded:
    """Return what the vision service said about a medium."""
    handle = response.handle
    return Encoded(
        handle=EmbeddingHandle(
            handle.digest, handle.tile_count, handle.token_count, handle.SerializeToString(), handle.frame_count
        ),
        cache_tier=values.tier_of(response.cache_tier),
        columns=response.columns,
        rows=response.rows,
        coalesced=response.coalesced,
        preprocess_s=seconds_of(response.preprocess_duration),
        encode_s=seconds_of(response.encode_duration),
        frames=tuple(VideoFrame(frame.index, frame.time_seconds) for frame in response.frames),
        queue_s=seconds_of(response.queue_duration),
        size_bytes=_size_bytes_of(handle),
    )


def estimate(response: vision_service_pb2.EstimateResponse) -> Estimate:
    """Return what a picture will take."""
    return Estimate(
        response.width,
        response.height,
        response.columns,
        response.rows,
        response.tile_count,
        response.token_count,
    )


def generate_event(response: llm_service_pb2.GenerateResponse) -> GenerateEvent | None:
    """Return the event of an answer; None for one that only newer gateways know."""
    match response.WhichOneof("event"):
        case "started":
            started = response.started
            return Started(
                started.model,
                started.prompt_token_count,
                tuple(started.prompt_token_ids),
                started.dropped_turn_count,
            )
        case "delta":
            delta = response.delta
            return Delta(
                delta.text, tuple(delta.token_ids), delta.candidate_index, tuple(map(_logprob, delta.logprobs))
            )
        case "finished":
            return _generated(response.finished)
    return None


def turn_scores(response: llm_service_pb2.ScoreTurnsResponse) -> list[tuple[float, ...]]:
    """Return the probability of each choice at each turn of the model's, in order."""
    return [tuple(turn.probabilities) for turn in response.turns]


def _size_bytes_of(handle: embedding_pb2.EmbeddingHandle) -> int:
    """Return the bytes of an embedding; 0 for one of a type that only newer gateways know."""
    data_type = DATA_TYPE_OF_MESSAGE.get(handle.data_type)
    return handle.token_count * row_bytes_of(handle.hidden_size, data_type) if data_type else 0


def _generated(finished: llm_service_pb2.GenerateFinished) -> Generated:
    usage = finished.usage
    return Generated(
        finish_reason=values.finish_reason_of(finished.finish_reason),
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
            Transfer(
                transfer.digest, values.tier_of(transfer.cache_tier), seconds_of(transfer.duration), transfer.size_bytes
            )
            for transfer in finished.transfers
        ),
        candidates=tuple(map(_candidate_result, finished.candidates)),
    )


def _candidate_result(result: llm_service_pb2.CandidateResult) -> CandidateResult:
    return CandidateResult(
        finish_reason=values.finish_reason_of(result.finish_reason),
        output_tokens=result.output_token_count,
        mean_logprob=result.mean_logprob,
        tool_calls=tuple(map(values.tool_call_of, result.tool_calls)),
    )


def _logprob(logprob: generation_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(logprob.token_id, logprob.token, logprob.logprob, tuple(map(_logprob, logprob.top)))
