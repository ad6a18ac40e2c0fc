"""Metrics of the vision service."""

from dataclasses import dataclass
from typing import Final, Self

from shared.metrics import CALLS_S, NO_METRICS, TILES, Counter, Gauge, Histogram, Registry


@dataclass(frozen=True, slots=True)
class VisionMetrics:
    """What the service counts between a call for an embedding and the answer."""

    lookups: Counter
    coalesced: Counter
    encodes: Counter
    encode_errors: Counter
    leases: Counter
    batch_tiles: Histogram
    preprocess: Histogram
    queue: Histogram
    encode: Histogram
    queued_tiles: Gauge

    @classmethod
    def declared(cls, registry: Registry) -> Self:
        """Declare the metrics.

        The reason of an error is that of the error itself, in lower case, and `internal` for one that is not ours.
        """
        return cls(
            lookups=registry.counter(
                "internvl_vision_lookups_total",
                "Embeddings looked for, by the cache that held them; none: it had to be made",
                tier=("local", "store", "none"),
            ),
            coalesced=registry.counter(
                "internvl_vision_coalesced_total",
                "Calls that shared an encode begun by another, in this process or in the fleet",
                scope=("process", "fleet"),
            ),
            encodes=registry.counter(
                "internvl_vision_encodes_total", "Media that were encoded", kind=("picture", "video")
            ),
            encode_errors=registry.counter(
                "internvl_vision_encode_errors_total", "Media whose encode failed, by the error's reason", reason=()
            ),
            leases=registry.counter(
                "internvl_vision_lease_total",
                "Fleet-wide leases on an encode: taken here, followed to another replica's embedding, expired before "
                "there was one, failed because the store did not answer",
                outcome=("taken", "followed", "expired", "failed"),
            ),
            batch_tiles=registry.histogram(
                "internvl_vision_batch_tiles", "Tiles of one pass through the vision tower", TILES
            ),
            preprocess=registry.histogram(
                "internvl_vision_preprocess_seconds", "From a medium's bytes to its tiles", CALLS_S
            ),
            queue=registry.histogram(
                "internvl_vision_queue_seconds", "How long a medium's first tile waited for the vision tower", CALLS_S
            ),
            encode=registry.histogram(
                "internvl_vision_encode_seconds", "From a medium's first pass through the tower to its last", CALLS_S
            ),
            queued_tiles=registry.gauge("internvl_vision_queued_tiles", "Tiles that wait for the vision tower"),
        )


UNOBSERVED: Final = VisionMetrics.declared(NO_METRICS)
