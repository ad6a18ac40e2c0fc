"""Metrics of the embedding store and of the caches in front of it, as their observer."""

from dataclasses import dataclass
from typing import Final, Self

from shared.metrics import NO_METRICS, CacheName, CommandOutcome, Counter, DropReason, Gauge, Registry


@dataclass(frozen=True, slots=True)
class StoreMetrics:
    """A `StoreObserver` that counts."""

    commands: Counter
    breaker_open: Gauge
    write_queue_items: Gauge
    write_queue_bytes: Gauge
    dropped_writes: Counter
    cache_bytes: Gauge
    cache_evictions: Counter

    @classmethod
    def declared(cls, registry: Registry) -> Self:
        """Declare the metrics."""
        return cls(
            commands=registry.counter(
                "internvl_store_commands_total",
                "Commands to the embedding store; skipped: an open breaker kept them back",
                command=(),
                outcome=("ok", "refused", "failed", "skipped"),
            ),
            breaker_open=registry.gauge(
                "internvl_store_breaker_open", "1 while commands to the embedding store are kept back, else 0"
            ),
            write_queue_items=registry.gauge(
                "internvl_store_write_queue_items", "Embeddings that wait to be written to the store"
            ),
            write_queue_bytes=registry.gauge(
                "internvl_store_write_queue_bytes", "Bytes of the embeddings that wait to be written to the store"
            ),
            dropped_writes=registry.counter(
                "internvl_store_dropped_writes_total",
                "Embeddings that were not written to the store",
                reason=("queue_full", "refused", "failed", "breaker_open", "closing"),
            ),
            cache_bytes=registry.gauge(
                "internvl_cache_bytes", "Bytes that a cache in this process's memory holds", cache=("embeddings",)
            ),
            cache_evictions=registry.counter(
                "internvl_cache_evictions_total",
                "Entries that a cache in memory dropped so that others fit",
                cache=("embeddings",),
            ),
        )

    def command_ended(self, command: str, outcome: CommandOutcome) -> None:
        """Count a command."""
        self.commands.inc(command=command, outcome=outcome)

    def breaker_changed(self, *, is_open: bool) -> None:
        """Note the breaker's state."""
        self.breaker_open.set(float(is_open))

    def write_queue_changed(self, items: int, size_bytes: int) -> None:
        """Note what waits to be written."""
        self.write_queue_items.set(items)
        self.write_queue_bytes.set(size_bytes)

    def write_dropped(self, reason: DropReason) -> None:
        """Count a write that was dropped."""
        self.dropped_writes.inc(reason=reason)

    def cache_changed(self, cache: CacheName, size_bytes: int) -> None:
        """Note what a cache holds."""
        self.cache_bytes.set(size_bytes, cache=cache)

    def cache_evicted(self, cache: CacheName, count: int = 1) -> None:
        """Count entries that had to go."""
        self.cache_evictions.inc(count, cache=cache)


UNOBSERVED: Final = StoreMetrics.declared(NO_METRICS)
