"""Between llm.v1 messages and the service's own types. Checks what comes from outside."""

import math
from collections.abc import Iterator

from internvl_serving.common.v1 import embedding_pb2, generation_pb2
from internvl_serving.llm.v1 import llm_service_pb2 as pb
from llm_service.answerer import Event, Finished, GenerationOptions, Started
from llm_service.candidate import CandidateResult, Delta, TokenLogprob, ToolCall
from llm_service.embeddings import FetchTier
from llm_service.engine.sequence import FinishReason, Priority, SamplingParams
from llm_service.fetcher import Transfer
from llm_service.prompt.dialogue import (
    Dialogue,
    EmbeddingRef,
    Role,
    Segment,
    TextSegment,
    Tool,
    ToolCallSegment,
    Turn,
    VisualSegment,
)
from llm_service.prompt.positions import ORDINARY_STRIDE
from llm_service.prompt.splice import PromptTokens
from shared.digest import checked_digest
from shared.errors import InvalidGenerationConfig, InvalidRequest
from shared.rpc.handles import HandleSigner
from shared.rpc.messages import DATA_TYPE_OF_MESSAGE, duration_of

MAX_STOP_SEQUENCES, MAX_STOP_CHARACTERS, MAX_BEAMS, MAX_TURNS = 16, 256, 16, 4096
MAX_CANDIDATES, MAX_TOP_LOGPROBS = 16, 20
MIN_CHOICES, MAX_CHOICES, MAX_CHOICE_CHARACTERS = 2, 16, 64
MAX_TENANT_BYTES = 128
_LEAST_TEMPERATURE = 1e-5  # what is colder is greedy: dividing by it would leave the range of float32

_ROLES = {
    generation_pb2.ROLE_USER: Role.USER,
    generation_pb2.ROLE_ASSISTANT: Role.ASSISTANT,
    generation_pb2.ROLE_TOOL: Role.TOOL,
}
_TIERS = {
    FetchTier.LOCAL: embedding_pb2.CACHE_TIER_LOCAL,
    FetchTier.STORE: embedding_pb2.CACHE_TIER_STORE,
    FetchTier.VISION: embedding_pb2.CACHE_TIER_VISION,
    FetchTier.PREFIX: embedding_pb2.CACHE_TIER_PREFIX,
}
_FINISH_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    FinishReason.TOOL_CALLS: generation_pb2.FINISH_REASON_TOOL_CALLS,
}


def dialogue_of(prompt: pb.Prompt, signer: HandleSigner, *, grounding: bool = False) -> Dialogue:
    """Return the dialogue of a prompt.

    Raises `InvalidRequest`, `EmbeddingHandleInvalid`, and `EmbeddingNotFound` for a handle that has expired.
    """
    if len(prompt.turns) > MAX_TURNS:
        raise InvalidRequest(f"A dialogue has at most {MAX_TURNS} turns.", field="prompt.turns")
    for handle in _handles_of(prompt):
        signer.check(handle)
    turns = tuple(part for index, turn in enumerate(prompt.turns) for part in _turns_of(turn, index))
    system_message = prompt.system_message if prompt.HasField("system_message") else None
    tools = tuple(Tool(tool.name, tool.description, tool.parameters_json_schema) for tool in prompt.tools)
    return Dialogue(turns, system_message, tools, grounding, _tenant_of(prompt))


def _tenant_of(prompt: pb.Prompt) -> str:
    if len(prompt.tenant.encode()) > MAX_TENANT_BYTES:
        raise InvalidRequest(f"A tenant has at most {MAX_TENANT_BYTES} bytes.", field="prompt.tenant")
    return prompt.tenant


def priority_of(request: pb.GenerateRequest) -> Priority:
    """Return whose turn it is; what is not known is a person's."""
    return Priority.BACKGROUND if request.priority == generation_pb2.PRIORITY_BACKGROUND else Priority.INTERACTIVE


def drops_oldest_turns(request: pb.GenerateRequest) -> bool:
    """Return whether turns may be left out; what is not known is no leave."""
    return request.context_overflow == generation_pb2.CONTEXT_OVERFLOW_DROP_OLDEST_TURNS


def options_of(
    config: generation_pb2.GenerationConfig, default_output_tokens: int, stop_token_ids: frozenset[int]
) -> GenerationOptions:
    """Return the decoding options, or raise `InvalidGenerationConfig` naming the field."""
    num_candidates = int(_checked(config, "candidate_count", 1, 1, MAX_CANDIDATES))
    options = GenerationOptions(
        sampling=_sampling_of(config, num_candidates, default_output_tokens, stop_token_ids),
        stop_sequences=_stop_sequences_of(config),
        num_beams=int(_checked(config, "num_beams", 1, 1, MAX_BEAMS)),
        num_candidates=num_candidates,
        json_schema=config.json_schema,
        visual_stride=_visual_stride_of(config),
        include_special_tokens=config.include_special_tokens,
        tells_logprobs=config.HasField("top_logprobs"),
    )
    if options.num_beams > 1:
        _check_search(options)
    endless = bool(options.json_schema) and config.ignore_end
    _require(not endless, "ignore_end", "An answer that meets a JSON schema has an end.")
    return options


def choices_of(request: pb.ScoreTurnsRequest) -> tuple[str, ...]:
    """Return the words to score by, or raise `InvalidRequest`."""
    choices = tuple(request.choices)
    if not MIN_CHOICES <= len(choices) <= MAX_CHOICES:
        raise InvalidRequest(f"There are {MIN_CHOICES} to {MAX_CHOICES} choices.", field="choices")
    if not all(0 < len(choice) <= MAX_CHOICE_CHARACTERS for choice in choices):
        raise InvalidRequest(f"A choice has 1 to {MAX_CHOICE_CHARACTERS} characters.", field="choices")
    return choices


def response_of(event: Event, prompt: PromptTokens, model: str, *, with_ids: bool) -> pb.GenerateResponse:
    """Return the message for an event of an answer to `prompt`."""
    match event:
        case Started():
            ids = prompt.ids if with_ids else ()
            started = pb.GenerateStarted(
                model=model,
                prompt_token_count=len(prompt.ids),
                prompt_token_ids=ids,
                dropped_turn_count=event.num_dropped,
            )
            return pb.GenerateResponse(started=started)
        case Delta():
            delta = pb.GenerateDelta(
                text=event.text,
                token_ids=event.token_ids if with_ids else (),
                candidate_index=event.candidate,
                logprobs=map(_logprob_of, event.logprobs),
            )
            return pb.GenerateResponse(delta=delta)
        case Finished():
            return pb.GenerateResponse(finished=_finished_of(event, prompt))


def count_response_of(prompt: PromptTokens, *, with_ids: bool = False) -> pb.CountTokensResponse:
    """Return the message for a prompt's size."""
    return pb.CountTokensResponse(
        token_count=len(prompt.ids),
        visual_token_count=prompt.num_visual_tokens,
        token_ids=prompt.ids if with_ids else (),
    )


def description_of(model: str, max_tokens: int) -> pb.DescribeModelResponse:
    """Return the message for the model that is served."""
    return pb.DescribeModelResponse(model=model, max_context_tokens=max_tokens)


def score_response_of(scores: tuple[tuple[float, ...], ...], model: str) -> pb.ScoreTurnsResponse:
    """Return the message for the probabilities of the choices at each turn."""
    return pb.ScoreTurnsResponse(turns=[pb.TurnScore(probabilities=turn) for turn in scores], model=model)


def _sampling_of(
    config: generation_pb2.GenerationConfig,
    num_candidates: int,
    default_output_tokens: int,
    stop_token_ids: frozenset[int],
) -> SamplingParams:
    temperature = _checked(config, "temperature", 0.0, 0.0, 100.0)
    top_logprobs = int(_checked(config, "top_logprobs", 0, 0, MAX_TOP_LOGPROBS))
    # Several candidates are ranked by their tokens' log-probabilities, even where nobody wants to see these.
    needs_logprobs = config.HasField("top_logprobs") or num_candidates > 1
    return SamplingParams(
        max_output_tokens=int(_checked(config, "max_output_tokens", default_output_tokens, 1, 1 << 20)),
        temperature=temperature if temperature >= _LEAST_TEMPERATURE else 0.0,
        top_p=_checked(config, "top_p", 1.0, 1e-6, 1.0),
        top_k=int(_checked(config, "top_k", 0, 0, 1 << 20)),
        min_p=_checked(config, "min_p", 0.0, 0.0, 1.0),
        repetition_penalty=_checked(config, "repetition_penalty", 1.0, 1e-2, 100.0),
        seed=config.seed if config.HasField("seed") else None,
        stop_token_ids=frozenset() if config.ignore_end else stop_token_ids,
        top_logprobs=top_logprobs if needs_logprobs else None,
    )


def _stop_sequences_of(config: generation_pb2.GenerationConfig) -> tuple[str, ...]:
    stops = tuple(config.stop_sequences)
    _require(len(stops) <= MAX_STOP_SEQUENCES, "stop_sequences", f"At most {MAX_STOP_SEQUENCES} are allowed.")
    for stop in stops:
        fits = 0 < len(stop) <= MAX_STOP_CHARACTERS
        _require(fits, "stop_sequences", f"Each has 1 to {MAX_STOP_CHARACTERS} characters.")
    return stops


def _visual_stride_of(config: generation_pb2.GenerationConfig) -> int:
    stride = int(_checked(config, "visual_position_stride", ORDINARY_STRIDE, 1, ORDINARY_STRIDE))
    _require(stride.bit_count() == 1, "visual_position_stride", "Allowed are 1, 2, 4, 8, 16, 32, 64, 128 and 256.")
    return stride


def _check_search(options: GenerationOptions) -> None:
    """Refuse what a beam search cannot do."""
    plain = options.sampling.takes_likeliest
    _require(plain, "num_beams", "Beam search takes neither temperature nor repetition_penalty.")
    alone = options.num_candidates == 1 and not options.tells_logprobs
    _require(alone, "num_beams", "Beam search takes neither candidate_count nor top_logprobs.")
    _require(not options.json_schema, "num_beams", "Beam search takes no json_schema.")


def _handles_of(prompt: pb.Prompt) -> Iterator[embedding_pb2.EmbeddingHandle]:
    for turn in prompt.turns:
        for segment in turn.segments:
            yield from segment.visual.embeddings


def _turns_of(turn: pb.Turn, index: int) -> Iterator[Turn]:
    """Yield the turn; the results of several tools, a segment each, are turns of their own."""
    if turn.role not in _ROLES:
        raise InvalidRequest("A turn has the role USER, ASSISTANT or TOOL.", field=f"prompt.turns[{index}].role")
    role, field = _ROLES[turn.role], f"prompt.turns[{index}].segments"
    segments = tuple(_segment_of(segment, field) for segment in turn.segments)
    if role is Role.TOOL:
        yield from (Turn(role, (segment,)) for segment in segments or (TextSegment(""),))
    else:
        yield Turn(role, segments)


def _segment_of(segment: pb.Segment, field: str) -> Segment:
    match segment.WhichOneof("content"):
        case "text":
            return TextSegment(segment.text)
        case "visual" if segment.visual.embeddings:
            visual = segment.visual
            refs = tuple(_ref_of(handle, field) for handle in visual.embeddings)
            return VisualSegment(refs, visual.frame if visual.HasField("frame") else None)
        case "tool_call":
            return ToolCallSegment(segment.tool_call.name, segment.tool_call.arguments_json)
        case _:
            raise InvalidRequest("A segment holds text, at least one embedding, or a call of a tool.", field=field)


def _ref_of(handle: embedding_pb2.EmbeddingHandle, field: str) -> EmbeddingRef:
    if handle.data_type not in DATA_TYPE_OF_MESSAGE or handle.tile_count < 1 or handle.frame_count < 0:
        raise InvalidRequest("An embedding handle is passed on as the vision service issued it.", field=field)
    return EmbeddingRef(
        digest=checked_digest(handle.digest, field),
        tile_count=handle.tile_count,
        token_count=handle.token_count,
        hidden_size=handle.hidden_size,
        data_type=DATA_TYPE_OF_MESSAGE[handle.data_type],
        source=handle.source,
        frame_count=handle.frame_count,
        media_digest=checked_digest(handle.media_digest, field),
        tenant=handle.tenant,
        handle=handle.SerializeToString(),
    )


def _checked(config: generation_pb2.GenerationConfig, field: str, default: float, least: float, most: float) -> float:
    value = getattr(config, field) if config.HasField(field) else default  # type: ignore[arg-type]  # a field's name
    # Written so that NaN, which compares with nothing, is refused too.
    _require(math.isfinite(value) and least <= value <= most, field, f"Allowed are {least:g} to {most:g}.")
    return float(value)


def _require(condition: bool, field: str, message: str) -> None:
    if not condition:
        raise InvalidGenerationConfig(message, field=f"generation_config.{field}")


def _finished_of(event: Finished, prompt: PromptTokens) -> pb.GenerateFinished:
    return pb.GenerateFinished(
        finish_reason=_FINISH_REASONS[event.reason],
        usage=generation_pb2.TokenUsage(
            prompt_token_count=len(prompt.ids),
            visual_token_count=prompt.num_visual_tokens,
            cached_token_count=event.num_cached,
            output_token_count=event.num_output_tokens,
        ),
        queue_duration=duration_of(event.queue_s),
        prefill_duration=duration_of(event.prefill_s),
        decode_duration=duration_of(event.decode_s),
        transfers=map(_transfer_of, event.transfers),
        candidates=map(_candidate_of, event.candidates),
    )


def _candidate_of(result: CandidateResult) -> pb.CandidateResult:
    return pb.CandidateResult(
        finish_reason=_FINISH_REASONS[result.reason],
        output_token_count=result.num_output_tokens,
        mean_logprob=result.mean_logprob,
        tool_calls=map(_tool_call_of, result.tool_calls),
    )


def _tool_call_of(call: ToolCall) -> generation_pb2.ToolCall:
    return generation_pb2.ToolCall(name=call.name, arguments_json=call.arguments_json, tool_call_id=call.tool_call_id)


def _logprob_of(entry: TokenLogprob) -> generation_pb2.TokenLogprob:
    return generation_pb2.TokenLogprob(
        token_id=entry.token_id, token=entry.token, logprob=entry.logprob, top=map(_logprob_of, entry.top)
    )


def _transfer_of(transfer: Transfer) -> pb.EmbeddingTransfer:
    return pb.EmbeddingTransfer(
        digest=transfer.digest,
        cache_tier=_TIERS[transfer.tier],
        duration=duration_of(transfer.duration_s),
        size_bytes=transfer.size_bytes,
    )
