"""How the gateway waits for a vision service that is full, and does without one that is away."""

import asyncio

import pytest

from gateway.content import Medium, PreprocessOptions, VideoOptions
from gateway.dialogue import PlacedMedium
from gateway.encoder import MediaEncoder
from gateway.events import CacheTier, Encoded
from gateway.media import LocalMediaCache, MediaLibrary
from shared.digest import digest_of
from shared.errors import QueueFull, VisionUnavailable
from shared.rpc.deadline import adopt
from tests.gateway.fakes_gateway import FakeVision, MemoryMediaStore, embedded


class CrowdedVision:
    """Encodes `places` media at a time, once `gate` is open, and refuses more."""

    def __init__(self, places: int, retry_after_s: float | None = 0.0) -> None:
        self.gate = asyncio.Event()
        self.places = places
        self.retry_after_s = retry_after_s
        self.working = self.most_working = self.refused = 0

    async def find(self, medium: Medium, *, prefetch: bool = False) -> Encoded | None:
        return None

    async def encode(self, medium: Medium, content: bytes, *, prefetch: bool = False) -> Encoded:
        if self.working >= self.places:
            self.refused += 1
            raise QueueFull("Full.", retry_after_s=self.retry_after_s)
        self.working += 1
        self.most_working = max(self.most_working, self.working)
        try:
            await self.gate.wait()
        finally:
            self.working -= 1
        return embedded(medium, CacheTier.NONE)


def videos(count: int) -> list[PlacedMedium]:
    contents = [bytes([number]) for number in range(count)]
    return [
        PlacedMedium(
            Medium(digest_of(content), PreprocessOptions(video=VideoOptions()), content),
            f"messages[0].parts[{number}].media",
        )
        for number, content in enumerate(contents)
    ]


def encoder(vision: CrowdedVision | FakeVision, patience_s: float) -> MediaEncoder:
    library = MediaLibrary(MemoryMediaStore(), LocalMediaCache(1 << 20), 1 << 20)
    return MediaEncoder(vision, library, parallel=8, patience_s=patience_s)


async def test_more_videos_than_there_is_room_for_take_turns() -> None:
    vision = CrowdedVision(places=4)
    encoding = asyncio.create_task(encoder(vision, patience_s=0.0).encode(videos(11)))
    while vision.refused < 20:  # all places are taken by this very dialogue: no patience is needed for that
        await asyncio.sleep(0)
    vision.gate.set()
    assert len(await encoding) == 11
    assert vision.most_working == 4


async def test_a_service_that_is_full_of_others_media_is_not_waited_for_for_ever() -> None:
    vision = CrowdedVision(places=0)
    with pytest.raises(QueueFull) as caught:
        await encoder(vision, patience_s=0.05).encode(videos(3))
    assert caught.value.retry_after_s == 0.0
    assert vision.refused > 3


async def test_without_patience_a_full_service_is_asked_once() -> None:
    vision = CrowdedVision(places=0, retry_after_s=None)
    with pytest.raises(QueueFull):
        await encoder(vision, patience_s=0.0).encode(videos(1))
    assert vision.refused == 1


async def test_nobody_waits_beyond_the_caller_s_deadline() -> None:
    vision = CrowdedVision(places=0, retry_after_s=600.0)
    adopt(300.0, "call-1")
    with pytest.raises(QueueFull):
        await encoder(vision, patience_s=1e6).encode(videos(1))
    assert vision.refused == 1


async def test_room_and_a_lost_replica_are_both_waited_for() -> None:
    vision = FakeVision()
    full = QueueFull("Full.", retry_after_s=0.0)
    vision.errors = [full, VisionUnavailable("Lost."), full, full]
    assert len(await encoder(vision, patience_s=60.0).encode(videos(1))) == 1
    vision.errors = [VisionUnavailable("Lost."), VisionUnavailable("Lost.")]
    with pytest.raises(VisionUnavailable):
        await encoder(vision, patience_s=60.0).encode(videos(1))


async def test_while_vision_is_away_a_handle_from_earlier_does() -> None:
    vision = FakeVision()
    media = encoder(vision, patience_s=60.0)
    (earlier,) = (await media.encode(videos(1))).values()
    vision.errors = [VisionUnavailable("Away.")] * 4
    (again,) = (await media.encode(videos(1))).values()
    assert (again.handle, again.cache_tier) == (earlier.handle, CacheTier.LOCAL)
    with pytest.raises(VisionUnavailable):
        await media.encode_again(videos(1))
    vision.errors = [VisionUnavailable("Away.")] * 2
    with pytest.raises(VisionUnavailable):
        await media.encode(videos(2)[1:])
