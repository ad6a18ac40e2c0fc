"""What a system does at the moment, from the metrics of its services."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from internvl_client.metrics_text import Samples, quantile

_FIRST_TOKEN: Final = "internvl_gateway_time_to_first_token_seconds"  # noqa: S105  not a secret
_TIERS: Final = "internvl_gateway_media_total"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The numbers of all services at a moment, in seconds of a monotonic clock."""

    time_s: float
    samples: Samples


@dataclass(frozen=True, slots=True)
class Load:
    """What is going on. None: not known, because no service tells it or there was only one look.

    Counts of turns and media are since the services began; `first_token_*` are of the time between two looks, or since
    the services began where nothing was answered meanwhile.
    """

    streams: int
    running: int
    waiting: int
    queued_tiles: int
    kv_used: int
    kv_kept: int
    kv_blocks: int
    turns: Mapping[str, int]
    media: Mapping[str, int]
    cached_share: float | None
    written_per_s: float | None
    read_per_s: float | None
    first_token_p50_s: float | None
    first_token_p95_s: float | None
    output_tokens: int


def load_of(now: Snapshot, before: Snapshot | None = None) -> Load:
    """Return what is going on at `now`; rates need a look `before`."""
    samples = now.samples
    prompt_tokens = samples.sum("internvl_gateway_prompt_tokens_total")
    first_token = _recent(now, before)
    return Load(
        streams=int(samples.sum("internvl_gateway_turns_in_progress")),
        running=int(samples.sum("internvl_llm_running_sequences")),
        waiting=int(samples.sum("internvl_llm_waiting_sequences")),
        queued_tiles=int(samples.sum("internvl_vision_queued_tiles")),
        kv_used=int(samples.sum("internvl_llm_kv_used_blocks")),
        kv_kept=int(samples.sum("internvl_llm_kv_kept_blocks")),
        kv_blocks=int(samples.sum("internvl_llm_kv_blocks")),
        turns=_counts(samples, "internvl_gateway_turns_total", "reason"),
        media=_counts(samples, _TIERS, "tier"),
        cached_share=samples.sum("internvl_gateway_cached_tokens_total") / prompt_tokens if prompt_tokens else None,
        written_per_s=_rate("internvl_llm_decoded_tokens_total", now, before),
        read_per_s=_rate("internvl_llm_prefilled_tokens_total", now, before),
        first_token_p50_s=quantile(0.5, first_token),
        first_token_p95_s=quantile(0.95, first_token),
        output_tokens=int(samples.sum("internvl_gateway_output_tokens_total")),
    )


def _counts(samples: Samples, name: str, label: str) -> dict[str, int]:
    return {value: int(count) for value, count in samples.by_label(name, label).items() if count}


def _rate(name: str, now: Snapshot, before: Snapshot | None) -> float | None:
    if before is None or now.time_s <= before.time_s or not now.samples.has(name):
        return None
    # A service that began anew counts from zero.
    return max(0.0, now.samples.sum(name) - before.samples.sum(name)) / (now.time_s - before.time_s)


def _recent(now: Snapshot, before: Snapshot | None) -> dict[float, float]:
    """Return the buckets of the time between two looks, or of all time where there was nothing between them."""
    buckets = now.samples.buckets(_FIRST_TOKEN)
    earlier = before.samples.buckets(_FIRST_TOKEN) if before else {}
    between = {bound: count - earlier.get(bound, 0.0) for bound, count in buckets.items()}
    is_sound = all(count >= 0 for count in between.values())
    return between if is_sound and any(between.values()) else buckets
