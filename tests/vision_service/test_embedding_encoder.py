"""An embedding comes from the nearest cache that holds it, and is encoded once where none does."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shared.digest import digest_of
from shared.embedding import MAX_SIZE_BYTES, DataType, EmbeddingInfo, EmbeddingKey, VideoFrame
from shared.errors import (
    DeadlineExceeded,
    EmbeddingNotFound,
    MediaDigestMismatch,
    MediaTooLarge,
    MediaUnreadable,
    QueueFull,
    ServiceError,
)
from shared.local_cache import LocalEmbeddingCache
from shared.rpc.deadline import adopt
from shared.store import NoEmbeddingStore
from shared.tensors import tensor_of
from tests.vision_service.memory_store import MemoryStore
from vision_service.batcher import Deadline, EncodedTiles
from vision_service.encoded import CacheTier, Encoded
from vision_service.encoder import Encoder, PendingLimits
from vision_service.fleet import Fleet, NoFleet
from vision_service.flights import Caches
from vision_service.maker import EmbeddingLimits, EmbeddingMaker, Storage
from vision_service.preparer import MediaSpec
from vision_service.preprocess.frames import VideoSpec
from vision_service.preprocess.image import Picture, Tiles, preprocess
from vision_service.preprocess.tiling import Grid, TilingSpec
from vision_service.runner import TowerIdentity, WorkerPool

TILING = TilingSpec(28, 1, 6, thumbnail=True)
SPEC = MediaSpec(TILING)
CLIP = MediaSpec(TILING, VideoSpec(4))
ROOM = PendingLimits(pictures=64, videos=64)
LIMITS = EmbeddingLimits(tokens_per_tile=2, hidden_size=8, max_bytes=1 << 20)
FRAMES = tuple(VideoFrame(5 * number, 0.2 * number) for number in range(4))


def picture(color: int = 0) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (60, 40), (color, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


class ScriptedTower:
    """Gives every tile two rows, numbered through, once `open` is set; raises `errors` first, one a call."""

    def __init__(self) -> None:
        self.identity = TowerIdentity("f" * 64, "float32")
        self.deadlines: list[Deadline] = []
        self.errors: list[Exception] = []
        self.data_type = torch.float32
        self.joined_on: list[int] = []
        self.open = asyncio.Event()
        self.open.set()

    async def encode(self, tiles: Tiles, deadline: Deadline) -> EncodedTiles:
        self.deadlines.append(deadline)
        await self.open.wait()
        if self.errors:
            raise self.errors.pop(0)
        rows = torch.arange(16.0 * len(tiles)).reshape(-1, 8).to(self.data_type)
        return EncodedTiles(Pieces(rows.split(3), self.joined_on), queue_s=0.25, encode_s=0.5)


class Pieces(Sequence[torch.Tensor]):
    """Pieces of visual tokens; notes on which threads they are looked at."""

    def __init__(self, pieces: Sequence[torch.Tensor], threads: list[int]) -> None:
        self.pieces, self.threads = pieces, threads

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: Any) -> Any:
        self.threads.append(threading.get_ident())
        return self.pieces[index]


class ScriptedPreparer:
    """Decodes pictures; takes anything for a video of four frames of two tiles each."""

    def __init__(self) -> None:
        self.prepared: list[MediaSpec] = []

    async def prepare(self, content: bytes, spec: MediaSpec, deadline: Deadline) -> Picture:
        self.prepared.append(spec)
        if spec.video is None:
            return preprocess(content, spec.tiling, 10_000)
        return Picture(64, 48, Grid(2, 1), np.zeros((8, 28, 28, 3), np.uint8), FRAMES)


class Bench:
    """An encoder and what it stands on; `sent` counts the times that a picture's bytes were read."""

    def __init__(self, encoder: Encoder, tower: ScriptedTower, preparer: ScriptedPreparer, store: MemoryStore) -> None:
        self.encoder, self.tower, self.preparer, self.store = encoder, tower, preparer, store
        self.sent = 0

    async def encode(
        self, content: bytes, spec: MediaSpec = SPEC, media_digest: str = "", tenant: str = "", prefetch: bool = False
    ) -> Encoded:
        wanted = self.encoder.wanted(media_digest or digest_of(content), spec, tenant, prefetch=prefetch)
        return await self.encoder.encode(wanted, Sent(self, content))

    async def ask(self, content: bytes, spec: MediaSpec = SPEC, tenant: str = "") -> Encoded:
        return await self.encoder.encode(self.encoder.wanted(digest_of(content), spec, tenant), Sent(self, None))


class Sent:
    """What a caller sends of a medium; None is one who only asks."""

    def __init__(self, at: Bench, content: bytes | None) -> None:
        self.at, self.content = at, content

    async def follows(self) -> bool:
        await asyncio.sleep(0)
        return self.content is not None

    async def read(self) -> bytes:
        self.at.sent += 1
        assert self.content is not None
        return self.content


@asynccontextmanager
async def bench(
    store: MemoryStore | None = None,
    cache_bytes: int = 1 << 20,
    max_pending: PendingLimits = ROOM,
    limits: EmbeddingLimits = LIMITS,
    fleet: Fleet | None = None,
    storage: Storage = "plain",
) -> AsyncIterator[Bench]:
    tower, preparer, workers = ScriptedTower(), ScriptedPreparer(), WorkerPool(2, "hash")
    kept = store or MemoryStore()
    maker = EmbeddingMaker(tower, preparer, workers, limits, storage)
    caches = Caches(LocalEmbeddingCache(cache_bytes), kept)
    encoder = Encoder(maker, caches, fleet or NoFleet(), workers, max_pending)
    try:
        yield Bench(encoder, tower, preparer, kept)
    finally:
        await encoder.close()
        workers.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def error_of(call: Awaitable[Encoded]) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        await call
    return caught.value


async def test_a_miss_without_bytes_is_not_found_and_names_the_embedding() -> None:
    async with bench() as at:
        error = await error_of(at.ask(picture()))
        assert isinstance(error, EmbeddingNotFound)
        assert error.resource == at.encoder.wanted(digest_of(picture()), SPEC).key.digest


async def test_a_picture_is_encoded_once_and_then_found_in_memory_without_its_bytes() -> None:
    async with bench() as at:
        first, second = await at.encode(picture()), await at.ask(picture())
        assert (first.tier, second.tier) == (CacheTier.NONE, CacheTier.LOCAL)
        assert first.info == second.info
        assert (first.info.columns, first.info.rows, first.info.tile_count, first.info.token_count) == (3, 2, 7, 14)
        assert (first.timings.queue_s, first.timings.encode_s) == (0.25, 0.5)
        assert second.timings.encode_s == 0
        assert len(at.tower.deadlines) == 1


async def test_a_hit_reads_no_bytes() -> None:
    async with bench() as at:
        await at.encode(picture())
        await at.encode(picture())
        assert at.sent == 1


async def test_what_another_replica_has_stored_is_found_without_reading_its_tensor() -> None:
    async with bench() as at:
        await at.encode(picture())
        async with bench(at.store) as other:
            found = await other.ask(picture())
            assert found.tier is CacheTier.STORE
            assert at.store.reads == 0
            assert (await other.encoder.fetch(found.key)).info == found.info
            assert other.tower.deadlines == []


async def test_a_store_that_fails_costs_nothing_but_time() -> None:
    async with bench(MemoryStore(broken=True)) as at:
        encoded = await at.encode(picture())
        assert (await at.ask(picture())).tier is CacheTier.LOCAL
        assert (await at.encoder.fetch(encoded.key)).info == encoded.info


async def test_without_any_cache_every_call_encodes() -> None:
    async with bench(MemoryStore(broken=True), cache_bytes=0) as at:
        assert (await at.encode(picture())).tier is CacheTier.NONE
        assert (await at.encode(picture())).tier is CacheTier.NONE


async def test_fetching_what_no_cache_holds_is_not_found() -> None:
    async with bench() as at:
        with pytest.raises(EmbeddingNotFound):
            await at.encoder.fetch(EmbeddingKey("0" * 64, "1" * 64))


async def test_bytes_of_another_digest_are_refused_large_or_small() -> None:
    async with bench() as at:
        for content in (picture(), picture() + bytes(1 << 20)):
            error = await error_of(at.encode(content, media_digest="0" * 64))
            assert isinstance(error, MediaDigestMismatch)
            assert error.field == "header.media_digest"


async def test_every_part_of_the_identity_changes_the_digest() -> None:
    async with bench() as at:
        media = digest_of(picture())
        tilings = [TILING, TILING.adjusted(3, None), TILING.adjusted(None, False), TilingSpec(56, 1, 6, True)]
        tilings.append(replace(TILING, policy="viewer"))
        clips = [VideoSpec(4), VideoSpec(5), VideoSpec(4, 1.0), VideoSpec(4, None, 1.0), VideoSpec(4, decoder="decord")]
        specs = [MediaSpec(tiling) for tiling in tilings] + [MediaSpec(TILING, video) for video in clips]
        digests = [at.encoder.wanted(media, spec).key.digest for spec in specs]
        digests += [at.encoder.wanted("0" * 64, SPEC).key.digest, at.encoder.wanted(media, SPEC, "a tenant").key.digest]
        for identity in (TowerIdentity("e" * 64, "float32"), TowerIdentity("f" * 64, "bfloat16")):
            at.tower.identity = identity
            digests.append(at.encoder.wanted(media, SPEC).key.digest)
    async with bench(storage="int8") as at:
        digests.append(at.encoder.wanted(media, SPEC).key.digest)
    assert len(set(digests)) == len(digests) == 15


async def test_a_hundred_concurrent_calls_share_one_encode() -> None:
    async with bench() as at:
        at.tower.open.clear()
        calls = [asyncio.create_task(at.encode(picture())) for _ in range(100)]
        await until(lambda: bool(at.tower.deadlines))
        at.tower.open.set()
        encoded = await asyncio.gather(*calls)
        assert len(at.tower.deadlines) == 1
        assert len({item.key for item in encoded}) == 1
        assert sum(not item.coalesced and item.tier is CacheTier.NONE for item in encoded) == 1


async def test_a_call_without_bytes_joins_an_encode_in_flight() -> None:
    async with bench() as at:
        at.tower.open.clear()
        leader = asyncio.create_task(at.encode(picture()))
        await until(lambda: bool(at.tower.deadlines))
        follower = asyncio.create_task(at.ask(picture()))
        await asyncio.sleep(0)
        at.tower.open.set()
        assert not (await leader).coalesced
        assert (await follower).coalesced


async def test_followers_get_their_embedding_when_the_leader_leaves() -> None:
    async with bench() as at:
        at.tower.open.clear()
        leader = asyncio.create_task(at.encode(picture()))
        await until(lambda: bool(at.tower.deadlines))
        follower = asyncio.create_task(at.ask(picture()))
        await asyncio.sleep(0)
        leader.cancel()
        await asyncio.wait([leader])
        at.tower.open.set()
        assert leader.cancelled()
        assert (await follower).coalesced
        assert len(at.tower.deadlines) == 1


async def test_an_encode_that_everybody_left_is_finished_and_kept() -> None:
    async with bench() as at:
        at.tower.open.clear()
        call = asyncio.create_task(at.encode(picture()))
        await until(lambda: bool(at.tower.deadlines))
        call.cancel()
        at.tower.open.set()
        await until(lambda: bool(at.store.kept))
        assert (await at.ask(picture())).tier is CacheTier.LOCAL


async def test_a_follower_with_more_time_keeps_the_encode_wanted() -> None:
    async with bench() as at:
        at.tower.open.clear()
        adopt(0.0, "")
        leader = asyncio.create_task(at.encode(picture()))
        await until(lambda: bool(at.tower.deadlines))
        assert at.tower.deadlines[0].passed
        adopt(None, "")
        follower = asyncio.create_task(at.ask(picture()))
        await asyncio.sleep(0)
        assert not at.tower.deadlines[0].passed
        at.tower.open.set()
        await asyncio.gather(leader, follower)


async def test_a_failure_is_shared_by_those_who_wait_and_forgotten_after() -> None:
    async with bench() as at:
        at.tower.open.clear()
        at.tower.errors.append(DeadlineExceeded("Too late."))
        calls = [asyncio.create_task(at.encode(picture())) for _ in range(3)]
        await until(lambda: bool(at.tower.deadlines))
        at.tower.open.set()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {DeadlineExceeded}
        assert (await at.encode(picture())).tier is CacheTier.NONE


async def test_a_mediums_pieces_are_joined_away_from_the_event_loop() -> None:
    async with bench() as at:
        encoded = await at.encode(b"a video", CLIP)
        tokens = tensor_of(await at.encoder.fetch(encoded.key))
    assert torch.equal(tokens, torch.arange(128.0).reshape(16, 8))
    assert at.tower.joined_on
    assert threading.get_ident() not in at.tower.joined_on


async def test_an_unreadable_picture_is_told_to_its_caller() -> None:
    async with bench() as at:
        assert isinstance(await error_of(at.encode(b"no picture")), MediaUnreadable)
        assert isinstance(await error_of(at.encode(b"")), MediaUnreadable)


async def test_a_video_that_is_found_again_tells_its_frames_without_being_decoded() -> None:
    async with bench() as at:
        first, second = await at.encode(b"a video", CLIP), await at.ask(b"a video", CLIP)
        assert (first.tier, second.tier) == (CacheTier.NONE, CacheTier.LOCAL)
        assert first.info == second.info
        assert first.info.frames == FRAMES
        assert (first.info.frame_count, first.info.tile_count, first.info.token_count) == (4, 8, 16)
        async with bench(at.store) as other:
            assert (await other.ask(b"a video", CLIP)).info == first.info
        assert at.preparer.prepared == [CLIP]


async def test_what_no_cache_can_hold_is_refused_before_it_is_encoded() -> None:
    clip_bytes = 8 * 2 * 8 * 4  # tiles, rows of each, width, float32
    async with bench(limits=replace(LIMITS, max_bytes=clip_bytes - 1)) as at:
        error = await error_of(at.encode(b"a video", CLIP))
        assert isinstance(error, MediaTooLarge)
        assert "at most 7" in error.message
        assert at.tower.deadlines == []
        assert (await at.encode(picture())).info.tile_count == 7
        at.tower.identity = TowerIdentity("f" * 64, "bfloat16")
        at.tower.data_type = torch.bfloat16
        assert (await at.encode(b"a video", CLIP)).info.size_bytes == clip_bytes // 2
    async with bench(limits=replace(LIMITS, max_bytes=clip_bytes)) as at:
        assert (await at.encode(b"a video", CLIP)).info.size_bytes == clip_bytes


@pytest.mark.parametrize("data_type", ["float32", "bfloat16"])
def test_as_many_tiles_as_the_limits_allow_are_plausible_and_one_more_is_not(data_type: DataType) -> None:
    for tokens_per_tile, hidden_size in ((256, 8192), (256, 3584), (1, 1), (1024, 8192), (1 << 12, 1)):
        limits = EmbeddingLimits(tokens_per_tile, hidden_size, MAX_SIZE_BYTES)
        most = limits.max_tiles(data_type)
        for tiles, expected in ((most, True), (most + 1, False)):
            info = EmbeddingInfo(tiles, tiles * tokens_per_tile, hidden_size, data_type, 10, 10, 1, 1)
            assert info.plausible() is expected


async def test_videos_take_no_room_from_pictures() -> None:
    async with bench(max_pending=PendingLimits(pictures=1, videos=1)) as at:
        at.tower.open.clear()
        video = asyncio.create_task(at.encode(b"a video", CLIP))
        await until(lambda: len(at.tower.deadlines) == 1)
        assert isinstance(await error_of(at.encode(b"another", CLIP)), QueueFull)
        still = asyncio.create_task(at.encode(picture()))
        await until(lambda: len(at.tower.deadlines) == 2)
        assert isinstance(await error_of(at.encode(picture(3))), QueueFull)
        assert at.sent == 2
        at.tower.open.set()
        await asyncio.gather(video, still)


async def test_asking_for_a_medium_needs_no_room() -> None:
    async with bench(max_pending=PendingLimits(pictures=64, videos=1)) as at:
        known = [b"one", b"two", b"three"]
        for content in known:
            await at.encode(content, CLIP)
        at.tower.open.clear()
        video = asyncio.create_task(at.encode(b"a video", CLIP))
        await until(lambda: len(at.tower.deadlines) == 4)
        assert [(await at.ask(content, CLIP)).tier for content in known] == [CacheTier.LOCAL] * 3
        asked = asyncio.gather(*(at.ask(bytes([number]), CLIP) for number in range(5)), return_exceptions=True)
        assert {type(outcome) for outcome in await asked} == {EmbeddingNotFound}
        refusal = await error_of(at.encode(b"another", CLIP))
        assert (type(refusal), refusal.retry_after_s) == (QueueFull, 1.0)
        at.tower.open.set()
        await video


async def test_a_call_joins_an_encode_that_began_while_it_waited_for_its_first_bytes() -> None:
    async with bench(max_pending=PendingLimits(pictures=1, videos=1)) as at:
        at.tower.open.clear()
        calls = [asyncio.create_task(at.encode(b"a video", CLIP)) for _ in range(2)]
        await until(lambda: bool(at.tower.deadlines))
        at.tower.open.set()
        assert sorted([(await call).coalesced for call in calls]) == [False, True]


async def test_one_picture_too_many_is_refused_before_its_bytes_are_read() -> None:
    async with bench(max_pending=PendingLimits(pictures=2, videos=2)) as at:
        at.tower.open.clear()
        calls = [asyncio.create_task(at.encode(picture(color))) for color in (1, 2)]
        await until(lambda: len(at.tower.deadlines) == 2)
        assert isinstance(await error_of(at.encode(picture(3))), QueueFull)
        assert at.sent == 2
        at.tower.open.set()
        await asyncio.gather(*calls)
        assert (await at.encode(picture(3))).tier is CacheTier.NONE


async def test_the_service_runs_without_a_store() -> None:
    tower, preparer, workers = ScriptedTower(), ScriptedPreparer(), WorkerPool(1, "hash")
    caches = Caches(LocalEmbeddingCache(1 << 20), NoEmbeddingStore())
    encoder = Encoder(EmbeddingMaker(tower, preparer, workers, LIMITS), caches, NoFleet(), workers, ROOM)
    at = Bench(encoder, tower, preparer, MemoryStore())
    encoded = await at.encode(picture())
    workers.close()
    assert (await at.encoder.fetch(encoded.key)).info.token_count == 14


async def test_tenants_share_nothing() -> None:
    async with bench() as at:
        mine = await at.encode(picture(), tenant="mine")
        assert isinstance(await error_of(at.ask(picture(), tenant="yours")), EmbeddingNotFound)
        assert (await at.encode(picture(), tenant="yours")).tier is CacheTier.NONE
        assert (await at.ask(picture(), tenant="mine")).key == mine.key


async def test_what_is_erased_is_encoded_again_and_others_stay() -> None:
    async with bench() as at:
        await at.encode(picture(1))
        await at.encode(picture(2))
        await at.encode(picture(1), tenant="yours")
        assert await at.encoder.erase("", digest_of(picture(1))) == 1
        assert isinstance(await error_of(at.ask(picture(1))), EmbeddingNotFound)
        assert (await at.ask(picture(2))).tier is CacheTier.LOCAL
        assert (await at.ask(picture(1), tenant="yours")).tier is CacheTier.LOCAL
        assert await at.encoder.erase("", None) == 1
        assert isinstance(await error_of(at.ask(picture(2))), EmbeddingNotFound)


async def test_what_is_erased_while_it_is_encoded_is_answered_and_not_kept() -> None:
    async with bench() as at:
        at.tower.open.clear()
        call = asyncio.create_task(at.encode(picture()))
        await until(lambda: bool(at.tower.deadlines))
        await at.encoder.erase("", digest_of(picture()))
        at.tower.open.set()
        assert (await call).tier is CacheTier.NONE
        assert not at.store.kept
        assert isinstance(await error_of(at.ask(picture())), EmbeddingNotFound)


async def test_what_is_prefetched_becomes_urgent_when_somebody_waits_for_it() -> None:
    async with bench() as at:
        at.tower.open.clear()
        early = asyncio.create_task(at.encode(picture(), prefetch=True))
        await until(lambda: bool(at.tower.deadlines))
        assert not at.tower.deadlines[0].urgent
        waiting = asyncio.create_task(at.encode(picture()))
        await until(lambda: at.tower.deadlines[0].urgent)
        at.tower.open.set()
        assert (await early).key == (await waiting).key


async def test_rows_kept_in_bytes_come_back_nearly_as_they_were() -> None:
    async with bench(storage="int8") as at:
        encoded = await at.encode(picture())
        kept = await at.encoder.fetch(encoded.key)
        assert kept.info.data_type == "int8_rows"
        assert kept.info.size_bytes == 14 * (8 + 4)
        rows = torch.arange(16.0 * 7).reshape(-1, 8)
        error = (tensor_of(kept).float() - rows).abs().amax(dim=1)
        assert (error <= rows.abs().amax(dim=1) / 127 / 2 + 1e-6).all()
