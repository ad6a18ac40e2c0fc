"""What a trace says of an answer, in the words that OpenTelemetry has for language models. Never what was said."""

import time

from gateway.events import Delta, Generated, GenerateEvent, GenerateRequest, Started
from shared.tracing import Span, Value


class AnswerTrace:
    """Follows the events of one answer and notes what they tell on its span."""

    def __init__(self, span: Span, request: GenerateRequest) -> None:
        self._span = span
        self._began = time.monotonic()
        self._has_begun = False
        span.note(_asked(request))

    def note(self, event: GenerateEvent) -> None:
        """Note an event."""
        match event:
            case Started():
                self._span.note({"gen_ai.response.model": event.model})
            case Delta() if not self._has_begun:
                self._has_begun = True
                self._span.note({"gen_ai.response.time_to_first_chunk": time.monotonic() - self._began})
            case Generated():
                self._span.note(_answered(event))


def _asked(request: GenerateRequest) -> dict[str, Value]:
    config = request.config
    chosen = {
        "gen_ai.request.choice.count": config.candidate_count,
        "gen_ai.request.max_tokens": config.max_output_tokens,
        "gen_ai.request.seed": config.seed,
        "gen_ai.request.temperature": config.temperature,
        "gen_ai.request.top_k": config.top_k,
        "gen_ai.request.top_p": config.top_p,
    }
    named: dict[str, Value] = {name: value for name, value in chosen.items() if value is not None}
    return {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "internvl-serving"} | named


def _answered(generated: Generated) -> dict[str, Value]:
    usage = generated.usage
    reasons = [result.finish_reason.value.lower() for result in generated.candidates] or [
        generated.finish_reason.value.lower()
    ]
    return {
        "gen_ai.response.finish_reasons": reasons,
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "internvl.visual_tokens": usage.visual_tokens,
    }
