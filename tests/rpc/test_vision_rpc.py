"""The vision service as its callers see it: a real server, a tiny golden checkpoint, a real Valkey."""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from safetensors.torch import load_file, save_file

from internvl_serving.common.v1.embedding_pb2 import (
    CACHE_TIER_LOCAL,
    CACHE_TIER_NONE,
    CACHE_TIER_STORE,
    DATA_TYPE_FLOAT32,
    EmbeddingHandle,
    PreprocessOptions,
    VideoOptions,
)
from internvl_serving.vision.v1.vision_service_pb2 import (
    EncodeHeader,
    EncodeRequest,
    EraseRequest,
    EstimateRequest,
)
from shared.checkpoint import Checkpoint, read_config
from shared.digest import digest_of
from shared.embedding import EmbeddingKey
from shared.erasures import erase_stored
from shared.errors import (
    EmbeddingHandleInvalid,
    EmbeddingNotFound,
    InvalidRequest,
    MediaDigestMismatch,
    MediaTooLarge,
    MediaUnreadable,
    VisionUnavailable,
)
from shared.patience import Patience
from shared.redis_link import open_link
from shared.rpc.status import from_rpc_error
from shared.store import open_embedding_store
from shared.stored_name import tenant_tag_of
from tests.gateway.fakes_gateway import valkey
from tests.rpc.vision_replica import TINY, Replica, error_of, replica, visual_tokens_of
from vision_service.model.loader import load_tower
from vision_service.model.tower import TowerConfig
from vision_service.preprocess.image import preprocess
from vision_service.preprocess.tiling import TilingSpec
from vision_service.settings import VisionSettings

ROOT = Path(__file__).parents[2]
PICTURE = (ROOT / "tests/golden/images/rgb_landscape.png").read_bytes()
OTHER = (ROOT / "tests/golden/images/cmyk.jpg").read_bytes()


@pytest.fixture(scope="module")
def valkey_url() -> Iterator[str]:
    with valkey() as server:
        yield server.connection_url


@pytest.fixture
def empty_valkey_url(valkey_url: str) -> str:
    import redis

    with redis.Redis.from_url(valkey_url) as client:
        client.flushall()
    return valkey_url


@torch.inference_mode()
def expected_tokens(content: bytes) -> torch.Tensor:
    config = read_config(TINY)
    tower = load_tower(Checkpoint(TINY), TowerConfig.of(config), torch.device("cpu"), torch.float32).tower
    picture = preprocess(content, TilingSpec.of(config), 40_000_000)
    tokens: torch.Tensor = tower(torch.from_numpy(picture.tiles.copy())).flatten(0, 1)
    return tokens


async def test_a_miss_without_bytes_then_an_encode_then_a_hit(tmp_path: Path, empty_valkey_url: str) -> None:
    async with replica(tmp_path, redis_url=empty_valkey_url) as at:
        digest = digest_of(PICTURE)
        missing = await error_of(at.encode(None, digest))
        encoded = await at.encode(PICTURE)
        found = await at.encode(None, digest)
        assert isinstance(missing, EmbeddingNotFound)
        assert missing.resource == encoded.handle.digest
        assert (encoded.cache_tier, found.cache_tier) == (CACHE_TIER_NONE, CACHE_TIER_LOCAL)
        assert encoded.encode_duration.ToNanoseconds() > 0
        assert found.encode_duration.ToNanoseconds() == 0
        assert found.handle.digest == encoded.handle.digest


async def test_the_handle_tells_all_that_the_next_stage_needs(tmp_path: Path) -> None:
    async with replica(tmp_path, advertise="vision-7:50051", embedding_ttl_s=100) as at:
        encoded = await at.encode(PICTURE, max_tiles=6)
        handle = encoded.handle
        assert handle.source == "vision-7:50051"
        assert handle.media_digest == digest_of(PICTURE)
        assert (handle.hidden_size, handle.data_type) == (64, DATA_TYPE_FLOAT32)
        assert handle.tile_count == encoded.columns * encoded.rows + 1
        assert handle.token_count == handle.tile_count * 4
        assert encoded.width > encoded.height > 0
        assert handle.expire_time.seconds > 100


async def test_a_fetched_embedding_is_what_the_tower_computes(tmp_path: Path) -> None:
    async with replica(tmp_path) as at:
        handle: EmbeddingHandle = (await at.encode(PICTURE)).handle
        assert handle.source == at.address
        messages = await at.fetch(handle)
        tokens = visual_tokens_of(messages)
        assert messages[0].header.tile_count == handle.tile_count
        torch.testing.assert_close(tokens, expected_tokens(PICTURE), atol=1e-5, rtol=0.0)


async def test_options_are_part_of_what_is_cached(tmp_path: Path) -> None:
    async with replica(tmp_path) as at:
        usual = await at.encode(PICTURE)
        one_tile = await at.encode(PICTURE, max_tiles=1)
        bare = await at.encode(PICTURE, thumbnail=False)
        assert len({response.handle.digest for response in (usual, one_tile, bare)}) == 3
        assert one_tile.handle.tile_count == 1
        assert bare.handle.tile_count == usual.handle.tile_count - 1


async def test_what_one_replica_encoded_another_finds_in_the_store(tmp_path: Path, empty_valkey_url: str) -> None:
    async with replica(tmp_path, redis_url=empty_valkey_url, embedding_key="secret") as first:
        encoded = await first.encode(PICTURE)
        original = await first.fetch(encoded.handle)
    async with replica(tmp_path, redis_url=empty_valkey_url, embedding_key="secret") as second:
        found = await second.encode(None, digest_of(PICTURE))
        assert found.cache_tier == CACHE_TIER_STORE
        assert (found.width, found.columns) == (encoded.width, encoded.columns)
        assert await second.fetch(found.handle) == original
    async with replica(tmp_path, redis_url=empty_valkey_url, embedding_key="other") as stranger:
        assert isinstance(await error_of(stranger.encode(None, digest_of(PICTURE))), EmbeddingNotFound)


async def test_without_its_store_the_service_still_answers(tmp_path: Path) -> None:
    with valkey() as server:
        async with replica(tmp_path, redis_url=server.connection_url) as at:
            await at.encode(PICTURE)
            server.terminate()
            assert (await at.encode(None, digest_of(PICTURE))).cache_tier == CACHE_TIER_LOCAL
            encoded = await at.encode(OTHER)
            assert encoded.cache_tier == CACHE_TIER_NONE
            assert len(await at.fetch(encoded.handle)) >= 2


async def test_a_large_embedding_comes_in_chunks_of_a_mebibyte(tmp_path: Path) -> None:
    async with replica(tmp_path) as at:
        encoded = await at.encode(PICTURE)
        header, *chunks = await at.fetch(encoded.handle)
        size = header.header.token_count * header.header.hidden_size * 4
        assert sum(len(message.chunk) for message in chunks) == size
        assert all(0 < len(message.chunk) <= 1 << 20 for message in chunks)


async def test_a_hundred_calls_at_once_encode_once(tmp_path: Path, empty_valkey_url: str) -> None:
    async with replica(tmp_path, redis_url=empty_valkey_url) as at:
        responses = await asyncio.gather(*(at.encode(PICTURE) for _ in range(100)))
        encodes = [item for item in responses if item.cache_tier == CACHE_TIER_NONE and not item.coalesced]
        assert len(encodes) == 1
        assert len({item.handle.digest for item in responses}) == 1


async def test_a_hit_is_answered_before_the_bytes_have_come(tmp_path: Path) -> None:
    async with replica(tmp_path) as at:
        await at.encode(PICTURE)

        async def endless() -> AsyncIterator[EncodeRequest]:
            yield EncodeRequest(header=EncodeHeader(media_digest=digest_of(PICTURE)))
            yield EncodeRequest(chunk=b"only the beginning")
            await asyncio.Event().wait()

        found = await asyncio.wait_for(at.stub.Encode(endless()), 10)
        assert found.cache_tier == CACHE_TIER_LOCAL


async def test_bytes_that_cannot_be_encoded_are_refused_with_their_reason(tmp_path: Path) -> None:
    async with replica(tmp_path, max_media_bytes=50_000, max_pixels=10_000) as at:
        mismatch = await error_of(at.encode(PICTURE, media_digest="0" * 64, chunk_bytes=50_000))
        unreadable = await error_of(at.encode(b"no picture at all"))
        many_pixels = await error_of(at.encode(PICTURE))
        many_bytes = await error_of(at.encode(bytes(50_001)))
        assert (type(mismatch), mismatch.field) == (MediaDigestMismatch, "header.media_digest")
        assert type(unreadable) is MediaUnreadable
        assert type(many_pixels) is MediaTooLarge
        assert type(many_bytes) is MediaTooLarge


async def test_messages_out_of_place_and_bad_fields_are_refused(tmp_path: Path) -> None:
    header = EncodeRequest(header=EncodeHeader(media_digest="0" * 64))
    chunk = EncodeRequest(chunk=b"x")
    async with replica(tmp_path, max_tiles_limit=12) as at:
        bad = {
            "header": [at.send(), at.send(chunk), at.send(EncodeRequest())],
            "chunk": [at.send(header, header), at.send(header, chunk, EncodeRequest())],
            "header.media_digest": [at.encode(None, "A" * 64), at.encode(None, "abc")],
            "header.options.max_tiles": [at.encode(PICTURE, max_tiles=count) for count in (0, -1, 13)],
            "header.tenant": [at.send(EncodeRequest(header=EncodeHeader(media_digest="0" * 64, tenant="x" * 129)))],
            "media_digest": [at.stub.Erase(EraseRequest(media_digest="../etc/passwd"))],
            "tenant": [at.stub.Erase(EraseRequest(tenant="x" * 129))],
            "options.video": [at.stub.Estimate(EstimateRequest(options=PreprocessOptions(video=VideoOptions())))],
            "options.max_tiles": [at.stub.Estimate(EstimateRequest(options=PreprocessOptions(max_tiles=13)))],
        }
        for field, calls in bad.items():
            for call in calls:
                error = await error_of(call)
                assert (type(error), error.field) == (InvalidRequest, field)


async def test_an_upload_that_is_answered_before_its_end_gets_that_answer(tmp_path: Path) -> None:
    async with replica(tmp_path) as at:
        await at.encode(PICTURE)
        for _ in range(200):  # without the reading of the rest, one in a hundred is told INTERNAL
            error = await error_of(at.encode(PICTURE, chunk_bytes=1000, max_tiles=0))
            assert (type(error), error.field) == (InvalidRequest, "header.options.max_tiles")
            assert (await at.encode(PICTURE, chunk_bytes=1000)).cache_tier == CACHE_TIER_LOCAL


async def test_a_refused_upload_that_never_ends_is_not_waited_for(tmp_path: Path) -> None:
    never = asyncio.Event()

    async def messages() -> AsyncIterator[EncodeRequest]:
        yield EncodeRequest(header=EncodeHeader(media_digest="A" * 64))
        await never.wait()

    async with replica(tmp_path) as at:
        assert isinstance(await error_of(at.stub.Encode(messages(), wait_for_ready=True)), InvalidRequest)


async def test_a_handle_that_was_made_up_changed_or_is_over_opens_nothing(tmp_path: Path) -> None:
    async with replica(tmp_path, embedding_ttl_s=1) as at:
        handle: EmbeddingHandle = (await at.encode(PICTURE)).handle
        made_up = EmbeddingHandle(digest=handle.digest, expire_time=handle.expire_time)
        forged = [made_up]
        for changes in ({"tenant": "mine"}, {"digest": "0" * 64}, {"token_count": 1}, {"source": "elsewhere:1"}):
            changed = EmbeddingHandle()
            changed.CopyFrom(handle)
            changed.MergeFrom(EmbeddingHandle(**changes))
            forged.append(changed)
        assert {type(await error_of(at.fetch(one))) for one in forged} == {EmbeddingHandleInvalid}
        while time.time() < handle.expire_time.seconds:
            await asyncio.sleep(0.05)
        assert isinstance(await error_of(at.fetch(handle)), EmbeddingNotFound)


async def test_what_is_erased_is_gone_from_the_store_and_from_memory(tmp_path: Path, empty_valkey_url: str) -> None:
    async with replica(tmp_path, redis_url=empty_valkey_url) as at:
        handle, kept = (await at.encode(PICTURE)).handle, (await at.encode(OTHER)).handle
        await stored(at, handle, kept)
        erased = await at.stub.Erase(EraseRequest(media_digest=digest_of(PICTURE)))
        assert erased.embedding_count == 1
        assert isinstance(await error_of(at.fetch(handle)), EmbeddingNotFound)
        assert len(await at.fetch(kept)) >= 2
        assert (await at.stub.Erase(EraseRequest(tenant="nobody"))).embedding_count == 0
        assert (await at.stub.Erase(EraseRequest())).embedding_count == 1


async def test_a_replica_forgets_what_another_one_erases(tmp_path: Path, empty_valkey_url: str) -> None:
    async with replica(tmp_path, redis_url=empty_valkey_url) as at:
        handle = (await at.encode(PICTURE)).handle
        await stored(at, handle)
        async with open_link(VisionSettings(model=TINY, redis_url=empty_valkey_url)) as link:
            assert link is not None
            assert await erase_stored(link, tenant_tag_of(""), digest_of(PICTURE)) == 1
        async with asyncio.timeout(20):
            while not isinstance(await outcome_of(at.fetch(handle)), EmbeddingNotFound):
                await asyncio.sleep(0.02)


async def stored(at: Replica, *handles: EmbeddingHandle) -> None:
    """Wait until the embeddings are in the store: they are written after the answer."""
    settings = VisionSettings(model=TINY, redis_url=at.redis_url)
    async with open_link(settings) as link, asyncio.timeout(20), open_embedding_store(link, settings) as store:
        for handle in handles:
            key = EmbeddingKey(handle.digest, handle.media_digest, handle.tenant)
            while not await store.describe(key, Patience()):
                await asyncio.sleep(0.01)


async def test_an_estimate_is_what_encoding_comes_to(tmp_path: Path) -> None:
    async with replica(tmp_path) as at:
        for content in (PICTURE, OTHER):
            encoded = await at.encode(content, max_tiles=6)
            options = PreprocessOptions(max_tiles=6)
            estimate = await at.stub.Estimate(EstimateRequest(content=content[:4096], options=options))
            assert (estimate.width, estimate.height) == (encoded.width, encoded.height)
            assert (estimate.columns, estimate.rows) == (encoded.columns, encoded.rows)
            assert (estimate.tile_count, estimate.token_count) == (
                encoded.handle.tile_count,
                encoded.handle.token_count,
            )
        assert isinstance(await error_of(at.stub.Estimate(EstimateRequest(content=b"no picture"))), MediaUnreadable)


async def test_tenants_share_no_embedding(tmp_path: Path) -> None:
    async with replica(tmp_path) as at:
        await at.encode(PICTURE)
        header = EncodeHeader(media_digest=digest_of(PICTURE), tenant="somebody")
        assert isinstance(await error_of(at.send(EncodeRequest(header=header))), EmbeddingNotFound)
        theirs = await at.send(EncodeRequest(header=header), EncodeRequest(chunk=PICTURE))
        assert theirs.cache_tier == CACHE_TIER_NONE
        assert theirs.handle.tenant == "somebody"


async def outcome_of(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error, VisionUnavailable)


def run_service(model: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vision_service", "--model", str(model), *flags]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos/gen'}"}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, cwd=ROOT)


def test_a_broken_checkpoint_ends_the_process_with_one_line_that_names_the_tensor(tmp_path: Path) -> None:
    model = Path(shutil.copytree(TINY, tmp_path / "model", copy_function=shutil.copyfile))
    weights = load_file(model / "model.safetensors")
    del weights["vision_model.encoder.layers.2.ls1"]
    save_file(weights, model / "model.safetensors")
    ended = run_service(model)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("vision: ")
    assert "'vision_model.encoder.layers.2.ls1'" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_a_mistake_in_the_settings_ends_the_process_with_one_line(tmp_path: Path) -> None:
    for flags, named in ([("--max-pixels", "0"), "--max-pixels"], [("--device", "tpu"), "--device"]):
        ended = run_service(TINY, *flags)
        assert ended.returncode == 2
        assert named in ended.stderr
        assert len(ended.stderr.splitlines()) == 1
    ended = run_service(tmp_path / "nowhere")
    assert ended.returncode == 2
    assert "--model (or VISION_MODEL)" in ended.stderr
