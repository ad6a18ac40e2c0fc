"""What is asked of the vision service about one medium, and what comes of it."""

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from shared.embedding import EmbeddingInfo, EmbeddingKey
from vision_service.preparer import MediaSpec


class CacheTier(Enum):
    """Which cache held an embedding."""

    NONE = "none"
    LOCAL = "local"
    STORE = "store"


class Upload(Protocol):
    """A medium's bytes on their way from the caller. Both raise `InvalidRequest`."""

    async def follows(self) -> bool:
        """Return whether the caller sends the bytes at all, having read no more than the first of them."""

    async def read(self) -> bytes:
        """Return the bytes; to be called once, and after `follows`. Raises `MediaTooLarge`."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A medium whose embedding is wanted, and which one. `prefetch`: nobody waits for it yet."""

    key: EmbeddingKey
    spec: MediaSpec
    prefetch: bool = False

    @property
    def is_video(self) -> bool:
        """Whether the medium is a video."""
        return self.spec.video is not None


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of work; all zero on a hit."""

    preprocess_s: float = 0.0
    queue_s: float = 0.0
    encode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Encoded:
    """An embedding that exists, and how it was come by.

    `coalesced`: the call shared an encode that another call had begun, here or on another replica.
    """

    key: EmbeddingKey
    info: EmbeddingInfo
    tier: CacheTier
    coalesced: bool = False
    timings: Timings = Timings()
