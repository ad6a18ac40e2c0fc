"""Metrics of the LLM service."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

from llm_service.embeddings import FetchedEmbedding
from llm_service.engine.engine import EngineStats
from shared.metrics import CALLS_S, MOMENTS_S, NO_METRICS, Counter, Histogram, Reading, Registry, Snapshot


@dataclass(frozen=True, slots=True)
class LlmMetrics:
    """What the service measures of answers and fetches, and what it reads off the engine when somebody asks.

    Searches over beams are not among the answers: their tokens come all at once.
    """

    queue: Histogram
    prefill: Histogram
    time_to_first_token: Histogram
    time_per_output_token: Histogram
    fetch: Histogram
    fetched_bytes: Counter
    engine: Snapshot[EngineStats]

    @classmethod
    def declared(cls, registry: Registry) -> Self:
        """Declare the metrics. Those of the engine come with `engine.connect`."""
        tiers = ("local", "store", "vision")
        return cls(
            queue=registry.histogram(
                "internvl_llm_queue_seconds",
                "From a prompt's arrival at the engine to the step that begins it",
                CALLS_S,
            ),
            prefill=registry.histogram(
                "internvl_llm_prefill_seconds", "From the step that begins a prompt to its first token", CALLS_S
            ),
            time_to_first_token=registry.histogram(
                "internvl_llm_time_to_first_token_seconds", "From a call's arrival to the first token", CALLS_S
            ),
            time_per_output_token=registry.histogram(
                "internvl_llm_time_per_output_token_seconds",
                "Mean time between an answer's tokens, once per answer",
                MOMENTS_S,
            ),
            fetch=registry.histogram(
                "internvl_llm_embedding_fetch_seconds",
                "How long a prompt's embedding took to get, by where it came from",
                MOMENTS_S,
                tier=tiers,
            ),
            fetched_bytes=registry.counter(
                "internvl_llm_embedding_fetched_bytes_total",
                "Bytes of the embeddings that prompts got, by where they came from",
                tier=tiers,
            ),
            engine=registry.snapshot(*_ENGINE),
        )

    def note_first_token(self, queue_s: float, prefill_s: float, since_arrival_s: float) -> None:
        """Note that an answer has its first token."""
        self.queue.observe(queue_s)
        self.prefill.observe(prefill_s)
        self.time_to_first_token.observe(since_arrival_s)

    def note_decoded(self, decode_s: float, num_tokens: int) -> None:
        """Note the tokens of an answer, and the time from the first to the last of them."""
        if num_tokens > 1:
            self.time_per_output_token.observe(decode_s / (num_tokens - 1))

    def note_fetched(self, embeddings: Iterable[FetchedEmbedding]) -> None:
        """Note what a prompt's embeddings took to get."""
        for fetched in embeddings:
            self.fetch.observe(fetched.duration_s, tier=fetched.tier.value)
            self.fetched_bytes.inc(fetched.embedding.info.size_bytes, tier=fetched.tier.value)


_ENGINE: Final[tuple[Reading[EngineStats], ...]] = (
    Reading(
        "internvl_llm_running_sequences", "gauge", "Sequences that have a place in every step", lambda s: s.num_running
    ),
    Reading("internvl_llm_waiting_sequences", "gauge", "Sequences that wait for a place", lambda s: s.num_waiting),
    Reading(
        "internvl_llm_kv_used_blocks",
        "gauge",
        "Blocks of the KV cache that sequences have",
        lambda s: s.num_blocks - s.num_free_blocks,
    ),
    Reading(
        "internvl_llm_kv_kept_blocks",
        "gauge",
        "Blocks of the KV cache that no sequence has, kept for prompts that begin alike",
        lambda s: s.num_kept_blocks,
    ),
    Reading("internvl_llm_kv_blocks", "gauge", "Blocks of the KV cache, used or not", lambda s: s.num_blocks),
    Reading(
        "internvl_llm_preemptions_total",
        "counter",
        "Times that a running sequence had to give its blocks back",
        lambda s: s.num_preemptions,
    ),
    Reading(
        "internvl_llm_prefilled_tokens_total",
        "counter",
        "Tokens that were read, those read again after a preemption included",
        lambda s: s.num_prefilled_tokens,
    ),
    Reading(
        "internvl_llm_cached_tokens_total",
        "counter",
        "Tokens of prompts whose keys and values were kept from earlier ones",
        lambda s: s.num_cached_tokens,
    ),
    Reading(
        "internvl_llm_decoded_tokens_total", "counter", "Tokens that were generated", lambda s: s.num_decoded_tokens
    ),
)
UNOBSERVED: Final = LlmMetrics.declared(NO_METRICS)
