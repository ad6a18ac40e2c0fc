"""Between llm.v1 messages and the service's own types. Checks what comes from outside."""

import math

from internvl_serving.common.v1 import embedding_pb2, generation_pb2
from internvl_serving.llm.v1 import llm_service_pb2 as pb
from llm_service.answerer import Delta, Event, Finished, GenerationOptions, Started
from llm_service.embeddings import FetchedEmbedding, FetchTier
from llm_service.engine.sequence import FinishReason, SamplingParams
from llm_service.prompt.dialogue import Dialogue, EmbeddingRef, Role, Segment, TextSegment, Turn, VisualSegment
from llm_service.prompt.splice import PromptTokens
from shared.digest import checked_digest
from shared.errors import InvalidGenerationConfig, InvalidRequest
from shared.rpc.messages import DATA_TYPE_OF_MESSAGE, duration_of

MAX_STOP_SEQUENCES, MAX_STOP_CHARACTERS, MAX_BEAMS, MAX_TURNS = 16, 256, 16, 4096
_LEAST_TEMPERATURE = 1e-5  # what is colder is greedy: dividing by it would leave the range of float32

_ROLES = {generation_pb2.ROLE_USER: Role.USER, generation_pb2.ROLE_ASSISTANT: Role.ASSISTANT}
_TIERS = {
    FetchTier.LOCAL: embedding_pb2.CACHE_TIER_LOCAL,
    FetchTier.STORE: embedding_pb2.CACHE_TIER_STORE,
    FetchTier.VISION: embedding_pb2.CACHE_TIER_VISION,
}
_FINISH_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}


def dialogue_of(prompt: pb.Prompt) -> Dialogue:
    """Return the dialogue of a prompt, or raise `InvalidRequest`."""
    if len(prompt.turns) > MAX_TURNS:
        raise InvalidRequest(f"A dialogue has at most {MAX_TURNS} turns.", field="prompt.turns")
    system_message = prompt.system_message if prompt.HasField("system_message") else None
    return Dialogue(tuple(_turn_of(turn, index) for index, turn in enumerate(prompt.turns)), system_message)


def options_of(
    config: generation_pb2.GenerationConfig, default_output_tokens: int, stop_token_ids: frozenset[int]
) -> GenerationOptions:
    """Return the decoding options, or raise `InvalidGenerationConfig` naming the field."""
    stops = tuple(config.stop_sequences)
    _require(len(stops) <= MAX_STOP_SEQUENCES, "stop_sequences", f"At most {MAX_STOP_SEQUENCES} are allowed.")
    for stop in stops:
        fits = 0 < len(stop) <= MAX_STOP_CHARACTERS
        _require(fits, "stop_sequences", f"Each has 1 to {MAX_STOP_CHARACTERS} characters.")
    temperature = _checked(config, "temperature", 0.0, 0.0, 100.0)
    sampling = SamplingParams(
        max_output_tokens=int(_checked(config, "max_output_tokens", default_output_tokens, 1, 1 << 20)),
        temperature=temperature if temperature >= _LEAST_TEMPERATURE else 0.0,
        top_p=_checked(config, "top_p", 1.0, 1e-6, 1.0),
        top_k=int(_checked(config, "top_k", 0, 0, 1 << 20)),
        min_p=_checked(config, "min_p", 0.0, 0.0, 1.0),
        repetition_penalty=_checked(config, "repetition_penalty", 1.0, 1e-2, 100.0),
        seed=config.seed if config.HasField("seed") else None,
        stop_token_ids=frozenset() if config.ignore_end else stop_token_ids,
    )
    num_beams = int(_checked(config, "num_beams", 1, 1, MAX_BEAMS))
    plain = sampling.is_greedy and sampling.repetition_penalty == 1.0
    _require(num_beams == 1 or plain, "num_beams", "Beam search takes neither temperature nor repetition_penalty.")
    return GenerationOptions(sampling, stops, num_beams)


def response_of(event: Event, prompt: PromptTokens, model: str, *, with_ids: bool) -> pb.GenerateResponse:
    """Return the message for an event of an answer to `prompt`."""
    match event:
        case Started():
            ids = prompt.ids if with_ids else ()
            started = pb.GenerateStarted(model=model, prompt_token_count=len(prompt.ids), prompt_token_ids=ids)
            return pb.GenerateResponse(started=started)
        case Delta(text, token_ids):
            return pb.GenerateResponse(delta=pb.GenerateDelta(text=text, token_ids=token_ids if with_ids else ()))
        case Finished():
            return pb.GenerateResponse(finished=_finished_of(event, prompt))


def count_response_of(prompt: PromptTokens) -> pb.CountTokensResponse:
    """Return the message for a prompt's size."""
    return pb.CountTokensResponse(token_count=len(prompt.ids), visual_token_count=prompt.num_visual_tokens)


def _turn_of(turn: pb.Turn, index: int) -> Turn:
    if turn.role not in _ROLES:
        raise InvalidRequest("A turn has the role USER or ASSISTANT.", field=f"prompt.turns[{index}].role")
    field = f"prompt.turns[{index}].segments"
    return Turn(_ROLES[turn.role], tuple(_segment_of(segment, field) for segment in turn.segments))


def _segment_of(segment: pb.Segment, field: str) -> Segment:
    match segment.WhichOneof("content"):
        case "text":
            return TextSegment(segment.text)
        case "visual" if segment.visual.embeddings:
            return VisualSegment(tuple(_ref_of(handle, field) for handle in segment.visual.embeddings))
        case _:
            raise InvalidRequest("A segment holds text or at least one embedding.", field=field)


def _ref_of(handle: embedding_pb2.EmbeddingHandle, field: str) -> EmbeddingRef:
    if handle.data_type not in DATA_TYPE_OF_MESSAGE or handle.tile_count < 1:
        raise InvalidRequest("An embedding handle is passed on as the vision service issued it.", field=field)
    return EmbeddingRef(
        digest=checked_digest(handle.digest, field),
        tile_count=handle.tile_count,
        token_count=handle.token_count,
        hidden_size=handle.hidden_size,
        data_type=DATA_TYPE_OF_MESSAGE[handle.data_type],
        source=handle.source,
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
            output_token_count=event.num_output_tokens,
        ),
        queue_duration=duration_of(event.queue_s),
        prefill_duration=duration_of(event.prefill_s),
        decode_duration=duration_of(event.decode_s),
        transfers=map(_transfer_of, event.transfers),
    )


def _transfer_of(fetched: FetchedEmbedding) -> pb.EmbeddingTransfer:
    return pb.EmbeddingTransfer(
        digest=fetched.embedding.digest, cache_tier=_TIERS[fetched.tier], duration=duration_of(fetched.duration_s)
    )
