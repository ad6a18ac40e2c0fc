"""Metrics of the gateway: what becomes of turns, whichever way they came."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Self

from gateway.events import CacheTier, Finished, FinishReason
from shared.metrics import CALLS_S, NO_METRICS, Counter, Gauge, Histogram, Registry

_FAILED, _ABANDONED = "failed", "abandoned"


class ObservedTurn:
    """One turn on its way; `finished` is None until it has its answer."""

    finished: Finished | None = None


@dataclass(frozen=True, slots=True)
class GatewayMetrics:
    """What the gateway counts of turns: of calls, of HTTP requests and of a batch's items alike."""

    turns: Counter
    in_progress: Gauge
    duration: Histogram
    media_duration: Histogram
    time_to_first_token: Histogram
    prompt_tokens: Counter
    cached_tokens: Counter
    output_tokens: Counter
    media: Counter

    @classmethod
    def declared(cls, registry: Registry) -> Self:
        """Declare the metrics."""
        return cls(
            turns=registry.counter(
                "internvl_gateway_turns_total",
                "Turns that ended, by why: the answer's finish reason, or an error, or the client left",
                reason=("stop", "length", "tool_calls", _FAILED, _ABANDONED),
            ),
            in_progress=registry.gauge("internvl_gateway_turns_in_progress", "Turns that have not ended"),
            duration=registry.histogram(
                "internvl_gateway_turn_duration_seconds", "From a turn's arrival to the end of its answer", CALLS_S
            ),
            media_duration=registry.histogram(
                "internvl_gateway_media_duration_seconds",
                "From the arrival of a turn with media until all their embeddings exist",
                CALLS_S,
            ),
            time_to_first_token=registry.histogram(
                "internvl_gateway_time_to_first_token_seconds",
                "From a turn's arrival to its answer's first text",
                CALLS_S,
            ),
            prompt_tokens=registry.counter(
                "internvl_gateway_prompt_tokens_total", "Tokens read for answers", kind=("text", "visual")
            ),
            cached_tokens=registry.counter(
                "internvl_gateway_cached_tokens_total",
                "Tokens of prompts that a cache held, so that they were not read",
            ),
            output_tokens=registry.counter("internvl_gateway_output_tokens_total", "Tokens written in answers"),
            media=registry.counter(
                "internvl_gateway_media_total",
                "Media of answered turns, by the cache that held their embedding; none: it was made",
                tier=("local", "store", "none"),
            ),
        )

    @contextmanager
    def turn(self) -> Iterator[ObservedTurn]:
        """Count a turn while the context lasts, and what became of it at its end."""
        turn = ObservedTurn()
        ending = _FAILED
        self.in_progress.add(1)
        try:
            yield turn
        except Exception:
            raise
        except BaseException:  # cancelled, or closed before its end
            ending = _ABANDONED
            raise
        finally:
            self.in_progress.add(-1)
            if turn.finished is None:
                self.turns.inc(reason=ending)
            else:
                self._note(turn.finished)

    def _note(self, finished: Finished) -> None:
        usage, timings = finished.generated.usage, finished.timings
        self.turns.inc(reason=_word(finished.best.result.finish_reason))
        self.duration.observe(timings.total_s)
        if timings.time_to_first_token_s is not None:
            self.time_to_first_token.observe(timings.time_to_first_token_s)
        if finished.receipts:
            self.media_duration.observe(timings.media_s)
        self.prompt_tokens.inc(usage.visual_tokens, kind="visual")
        self.prompt_tokens.inc(max(0, usage.prompt_tokens - usage.visual_tokens), kind="text")
        self.cached_tokens.inc(usage.cached_tokens)
        self.output_tokens.inc(usage.output_tokens)
        for receipt in finished.receipts:
            self.media.inc(tier=_word(receipt.encoded.cache_tier))


def _word(value: FinishReason | CacheTier) -> str:
    return value.value.lower()


UNOBSERVED: Final = GatewayMetrics.declared(NO_METRICS)
