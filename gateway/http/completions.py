"""From a turn's events to a chat completion: the whole object, or the chunks of a stream."""

import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final

from gateway.content import ToolCall
from gateway.events import (
    Candidate,
    ChatEvent,
    Delta,
    Finished,
    FinishReason,
    MediaReceipt,
    Started,
    TokenLogprob,
    TokenUsage,
)

Json = dict[str, Any]
_LEAST_LOGPROB: Final = -9999.0  # OpenAI's own stand-in for minus infinity, which JSON does not have
_FINISH_REASONS: Final = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.TOOL_CALLS: "tool_calls",
}


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion in the making: what all its chunks, or the one object, say alike."""

    request_id: str
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self, events: AsyncGenerator[ChatEvent, None]) -> Json:
        """Return the completion; raises what the turn raises."""
        logprobs: defaultdict[int, list[Json]] = defaultdict(list)
        model = ""
        async with aclosing(events):
            async for event in events:
                match event:
                    case Started():
                        model = event.model
                    case Delta() if event.logprobs:
                        logprobs[event.candidate_index] += map(_logprob, event.logprobs)
                    case Finished():
                        finished = event
        choices = [
            _choice(index, candidate, logprobs.get(index)) for index, candidate in enumerate(finished.candidates)
        ]
        usage = {"usage": _usage(finished.generated.usage)}
        return self._object("chat.completion", model, choices) | usage | self._facts(finished)

    async def chunks(
        self, events: AsyncGenerator[ChatEvent, None], count: int = 1, *, with_usage: bool = False
    ) -> AsyncGenerator[Json, None]:
        """Yield the chunks of a stream of `count` choices; raises what the turn raises.

        The last one bears the server's own facts, and the usage where that was asked for.
        """
        model = ""
        async with aclosing(events):
            async for event in events:
                match event:
                    case Started():
                        model = event.model
                        for index in range(count):
                            yield self._chunk(model, with_usage, _delta(index, {"role": "assistant", "content": ""}))
                    case Delta() if event.text or event.logprobs:
                        yield self._chunk(model, with_usage, _text_delta(event))
                    case Finished():
                        for chunk in self._last_chunks(model, event, with_usage=with_usage):
                            yield chunk

    def _last_chunks(self, model: str, finished: Finished, *, with_usage: bool) -> Iterator[Json]:
        last: Json = {}
        for index, candidate in enumerate(finished.candidates):
            if last:
                yield last
            if candidate.result.tool_calls:
                calls = [{"index": number} | _call(call) for number, call in enumerate(candidate.result.tool_calls)]
                yield self._chunk(model, with_usage, _delta(index, {"tool_calls": calls}))
            last = self._chunk(model, with_usage, _delta(index, {}, _finish_reason(candidate)))
        if with_usage:
            yield last
            last = self._chunk(model, with_usage) | {"usage": _usage(finished.generated.usage)}
        yield last | self._facts(finished)

    def _chunk(self, model: str, with_usage: bool, *choices: Json) -> Json:
        return self._object("chat.completion.chunk", model, list(choices)) | ({"usage": None} if with_usage else {})

    def _object(self, kind: str, model: str, choices: list[Json]) -> Json:
        return {
            "id": f"chatcmpl-{self.request_id}",
            "object": kind,
            "created": self.created,
            "model": model,
            "choices": choices,
        }

    def _facts(self, finished: Finished) -> Json:
        generated, timings = finished.generated, finished.timings
        facts = {
            "request_id": self.request_id,
            "visual_tokens": generated.usage.visual_tokens,
            "best_choice": finished.best_index,
            "timings": {
                "media_s": timings.media_s,
                "queue_s": generated.queue_s,
                "prefill_s": generated.prefill_s,
                "time_to_first_token_s": timings.time_to_first_token_s,
                "decode_s": generated.decode_s,
                "total_s": timings.total_s,
                "output_tokens_per_s": generated.output_tokens_per_s,
            },
            "receipts": list(map(_receipt, finished.receipts)),
        }
        return {"internvl": facts}


def _choice(index: int, candidate: Candidate, logprobs: list[Json] | None) -> Json:
    calls = candidate.result.tool_calls
    message: Json = {"role": "assistant", "content": candidate.text or (None if calls else ""), "refusal": None}
    if calls:
        message["tool_calls"] = list(map(_call, calls))
    return {
        "index": index,
        "message": message,
        "finish_reason": _finish_reason(candidate),
        "logprobs": None if logprobs is None else {"content": logprobs, "refusal": None},
    }


def _delta(index: int, delta: Json, finish_reason: str | None = None) -> Json:
    return {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": None}


def _text_delta(event: Delta) -> Json:
    choice = _delta(event.candidate_index, {"content": event.text})
    if event.logprobs:
        choice["logprobs"] = {"content": list(map(_logprob, event.logprobs)), "refusal": None}
    return choice


def _call(call: ToolCall) -> Json:
    return {
        "id": call.tool_call_id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments_json},
    }


def _finish_reason(candidate: Candidate) -> str:
    return _FINISH_REASONS.get(candidate.result.finish_reason, "stop")


def _logprob(token: TokenLogprob) -> Json:
    return _bare_logprob(token) | {"top_logprobs": list(map(_bare_logprob, token.top))}


def _bare_logprob(token: TokenLogprob) -> Json:
    return {
        "token": token.token.decode(errors="replace"),
        "logprob": max(token.logprob, _LEAST_LOGPROB),
        "bytes": list(token.token),
    }


def _usage(usage: TokenUsage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _receipt(receipt: MediaReceipt) -> Json:
    encoded, transfer = receipt.encoded, receipt.transfer
    return {
        "media_digest": receipt.media_digest,
        "tile_count": encoded.handle.tile_count,
        "columns": encoded.columns,
        "rows": encoded.rows,
        "token_count": encoded.handle.token_count,
        "cache_tier": encoded.cache_tier.value,
        "coalesced": encoded.coalesced,
        "preprocess_s": encoded.preprocess_s,
        "queue_s": encoded.queue_s,
        "encode_s": encoded.encode_s,
        "embedding_size_bytes": encoded.size_bytes,
        "transfer_tier": transfer.cache_tier.value if transfer else "UNSPECIFIED",
        "transfer_s": transfer.duration_s if transfer else 0.0,
        "transfer_size_bytes": transfer.size_bytes if transfer else 0,
        "frames": [{"index": frame.index, "time_s": frame.time_s} for frame in encoded.frames],
    }
