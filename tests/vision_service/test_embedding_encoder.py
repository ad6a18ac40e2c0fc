"""An embedding comes from the nearest cache that holds it, and is encoded once where none does."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from io import BytesIO

import pytest
import torch
from PIL import Image

from shared.digest import digest_of
from shared.embedding import Embedding, EmbeddingInfo
from shared.errors import (
    DeadlineExceeded,
    EmbeddingNotFound,
    MediaDigestMismatch,
    MediaUnreadable,
    QueueFull,
    ServiceError,
)
from shared.rpc.deadline import adopt
from shared.store import EmbeddingStore, LocalEmbeddingCache, NoEmbeddingStore
from vision_service.batcher import Deadline, EncodedTiles
from vision_service.encoder import CacheTier, Encoded, Encoder
from vision_service.preprocess.image import Tiles
from vision_service.preprocess.tiling import TilingSpec
from vision_service.runner import TowerIdentity, WorkerPool

SPEC = TilingSpec(28, 1, 6, thumbnail=True)


def picture(color: int = 0) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (60, 40), (color, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


class ScriptedTower:
    """Gives every tile two rows of ones once `open` is set; raises `errors` first, one a call."""

    def __init__(self) -> None:
        self.identity = TowerIdentity("f" * 64, "float32")
        self.deadlines: list[Deadline] = []
        self.errors: list[Exception] = []
        self.open = asyncio.Event()
        self.open.set()

    async def encode(self, tiles: Tiles, deadline: Deadline) -> EncodedTiles:
        self.deadlines.append(deadline)
        await self.open.wait()
        if self.errors:
            raise self.errors.pop(0)
        return EncodedTiles(torch.ones(2 * len(tiles), 8), queue_s=0.25, encode_s=0.5)


class MemoryStore:
    """An embedding store in a dictionary; `broken` answers as a store whose Redis is gone."""

    def __init__(self, broken: bool = False) -> None:
        self.kept: dict[str, Embedding] = {}
        self.broken = broken
        self.reads = 0

    async def describe(self, digest: str) -> EmbeddingInfo | None:
        await asyncio.sleep(0)
        return self.kept[digest].info if digest in self.kept else None

    async def get(self, digest: str) -> Embedding | None:
        self.reads += 1
        return self.kept.get(digest)

    async def put(self, embedding: Embedding) -> bool:
        await asyncio.sleep(0)
        if not self.broken:
            self.kept[embedding.digest] = embedding
        return not self.broken

    async def delete(self, digest: str) -> None:
        self.kept.pop(digest, None)


class Bench:
    """An encoder and what it stands on; `sent` counts the times that a picture's bytes were read."""

    def __init__(self, encoder: Encoder, tower: ScriptedTower, store: MemoryStore) -> None:
        self.encoder, self.tower, self.store = encoder, tower, store
        self.sent = 0

    async def encode(self, content: bytes, spec: TilingSpec = SPEC, media_digest: str = "") -> Encoded:
        async def read() -> bytes:
            self.sent += 1
            return content

        return await self.encoder.encode(media_digest or digest_of(content), spec, read)

    async def ask(self, content: bytes) -> Encoded:
        return await self.encoder.encode(digest_of(content), SPEC, no_content)


async def no_content() -> None:
    return None


@asynccontextmanager
async def bench(
    store: MemoryStore | None = None, cache_bytes: int = 1 << 20, max_pending: int = 64
) -> AsyncIterator[Bench]:
    tower, workers, kept = ScriptedTower(), WorkerPool(2, "decode"), store or MemoryStore()
    encoder = Encoder(
        tower, workers, kept, LocalEmbeddingCache(cache_bytes), max_pixels=10_000, max_pending=max_pending
    )
    try:
        yield Bench(encoder, tower, kept)
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
        assert error.resource == at.encoder.digest_of(digest_of(picture()), SPEC)


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
            assert (await other.encoder.fetch(found.digest)).info == found.info
            assert other.tower.deadlines == []


async def test_a_store_that_fails_costs_nothing_but_time() -> None:
    async with bench(MemoryStore(broken=True)) as at:
        encoded = await at.encode(picture())
        assert (await at.ask(picture())).tier is CacheTier.LOCAL
        assert (await at.encoder.fetch(encoded.digest)).info == encoded.info


async def test_without_any_cache_every_call_encodes() -> None:
    async with bench(MemoryStore(broken=True), cache_bytes=0) as at:
        assert (await at.encode(picture())).tier is CacheTier.NONE
        assert (await at.encode(picture())).tier is CacheTier.NONE


async def test_fetching_what_no_cache_holds_is_not_found() -> None:
    async with bench() as at:
        with pytest.raises(EmbeddingNotFound):
            await at.encoder.fetch("0" * 64)


async def test_bytes_of_another_digest_are_refused_large_or_small() -> None:
    async with bench() as at:
        for content in (picture(), picture() + bytes(1 << 20)):
            error = await error_of(at.encode(content, media_digest="0" * 64))
            assert isinstance(error, MediaDigestMismatch)
            assert error.field == "header.media_digest"


async def test_every_part_of_the_identity_changes_the_digest() -> None:
    async with bench() as at:
        media = digest_of(picture())
        specs = [SPEC, SPEC.adjusted(3, None), SPEC.adjusted(None, False), TilingSpec(56, 1, 6, True)]
        digests = [at.encoder.digest_of(media, spec) for spec in specs] + [at.encoder.digest_of("0" * 64, SPEC)]
        for identity in (TowerIdentity("e" * 64, "float32"), TowerIdentity("f" * 64, "bfloat16")):
            at.tower.identity = identity
            digests.append(at.encoder.digest_of(media, SPEC))
        assert len(set(digests)) == 7


async def test_a_hundred_concurrent_calls_share_one_encode() -> None:
    async with bench() as at:
        at.tower.open.clear()
        calls = [asyncio.create_task(at.encode(picture())) for _ in range(100)]
        await until(lambda: bool(at.tower.deadlines))
        at.tower.open.set()
        encoded = await asyncio.gather(*calls)
        assert len(at.tower.deadlines) == 1
        assert len({item.digest for item in encoded}) == 1
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


async def test_an_unreadable_picture_is_told_to_its_caller() -> None:
    async with bench() as at:
        assert isinstance(await error_of(at.encode(b"no picture")), MediaUnreadable)
        assert isinstance(await error_of(at.encode(b"")), MediaUnreadable)


async def test_one_picture_too_many_is_refused_before_its_bytes_are_read() -> None:
    async with bench(max_pending=2) as at:
        at.tower.open.clear()
        calls = [asyncio.create_task(at.encode(picture(color))) for color in (1, 2)]
        await until(lambda: len(at.tower.deadlines) == 2)
        assert isinstance(await error_of(at.encode(picture(3))), QueueFull)
        assert at.sent == 2
        at.tower.open.set()
        await asyncio.gather(*calls)
        assert (await at.encode(picture(3))).tier is CacheTier.NONE


async def test_the_service_runs_without_a_store() -> None:
    store: EmbeddingStore = NoEmbeddingStore()
    tower, workers = ScriptedTower(), WorkerPool(1, "decode")
    encoder = Encoder(tower, workers, store, LocalEmbeddingCache(1 << 20), max_pixels=10_000, max_pending=4)

    async def read() -> bytes:
        return picture()

    encoded = await encoder.encode(digest_of(picture()), SPEC, read)
    workers.close()
    assert (await encoder.fetch(encoded.digest)).info.token_count == 14
