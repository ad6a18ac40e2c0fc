"""Metrics of the gateway: what becomes of turns, whichever way they came."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Self

from gateway.events import CacheTier, Finished, FinishReason
from shared.errors import QueueFull, RateLimited
from shared.metrics import CALLS_S, NO_METRICS, Counter, Gauge, Histogram, Registry

_REPLAYED, _REFUSED, _FAILED, _ABANDONED = "replayed", "refused", "failed", "abandoned"


class ObservedTurn:
    """One turn on its way; `finished` is None until it has its answer. `is_replayed`: an earlier turn had it."""

    finished: Finished | None = None
    is_replayed = False


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
                "Turns that ended, by why: the answer's finish reason, or refused, or an error, or the client left",
                reason=("stop", "length", "tool_calls", _REPLAYED, _REFUSED, _FAILED, _ABANDONED),
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
        except (QueueFull, RateLimited):
            ending = _REFUSED
            raise
        except Exception:
            raise
        except BaseException:  # cancelled, or closed before its end
            ending = _ABANDONED
            raise
        finally:
            self.in_progress.add(-1)
            if turn.is_replayed:
                self.turns.inc(reason=_REPLAYED)
            elif turn.finished is None:
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


@dataclass(frozen=True, slots=True)
class AdmissionMetrics:
    """What the gateway counts of turns before they run."""

    waiting: Gauge
    wait: Histogram
    refused: Counter

    @classmethod
    def declared(cls, registry: Registry) -> Self:
        """Declare the metrics."""
        kinds = ("interactive", "background")
        return cls(
            waiting=registry.gauge("internvl_gateway_turns_waiting", "Turns that wait until they may run", kind=kinds),
            wait=registry.histogram(
                "internvl_gateway_wait_seconds", "How long turns waited that were let in", CALLS_S, kind=kinds
            ),
            refused=registry.counter(
                "internvl_gateway_refusals_total",
                "Turns and media that were not let in: the queue was full, too slow for a deadline, gave the place to "
                "a tenant with fewer turns, or was waited in too long; or which budget of the tenant was used up",
                reason=(*QUEUE_REASONS, *QUOTAS),
            ),
        )


QUEUE_REASONS: Final = ("full", "hopeless", "displaced", "waited")
QUOTAS: Final = ("requests_per_minute", "concurrent_requests", "tiles_per_minute", "tokens_per_minute")
UNOBSERVED: Final = GatewayMetrics.declared(NO_METRICS)
UNOBSERVED_ADMISSION: Final = AdmissionMetrics.declared(NO_METRICS)
