"""Videos, image policy and several devices as callers of the vision service see them."""

import asyncio
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from internvl_serving.common.v1.embedding_pb2 import (
    CACHE_TIER_LOCAL,
    CACHE_TIER_NONE,
    CACHE_TIER_STORE,
    VideoOptions,
)
from internvl_serving.vision.v1.vision_service_pb2 import EncodeResponse
from shared.checkpoint import Checkpoint, read_config
from shared.digest import digest_of
from shared.errors import (
    CheckpointError,
    EmbeddingNotFound,
    InvalidRequest,
    MediaTooLarge,
    MediaUnreadable,
    QueueFull,
    ServiceError,
    VideoRangeEmpty,
)
from tests import clips
from tests.clips import CLIPS, Clip, content_of
from tests.gateway.fakes_gateway import valkey
from tests.rpc.vision_replica import TINY, Replica, error_of, replica, visual_tokens_of
from vision_service.app import lifespan
from vision_service.model.loader import load_tower
from vision_service.model.tower import TowerConfig
from vision_service.preprocess.frames import VideoSpec
from vision_service.preprocess.tiling import TilingSpec
from vision_service.settings import VisionSettings
from vision_service.video.preparation import prepare, source_of
from vision_service.video.source import VideoLimits

GOLDEN = Path(__file__).parents[1] / "golden"
CLIP = content_of("h264 mp4 open GOP")
LIMITS = VideoLimits(max_pixels=1_000_000, max_clip_frames=1000, max_clip_s=100, max_tiles=1000)
FIELD = "header.options.video"


async def encode_video(at: Replica, content: bytes | None, media_digest: str = "", **options: Any) -> EncodeResponse:
    video = VideoOptions(
        **{name: options.pop(name) for name in ("segment_count", "start_seconds", "end_seconds") if name in options}
    )
    return await at.encode(content, media_digest, chunk_bytes=50_000, video=video, **options)


@torch.inference_mode()
def expected_tokens(content: bytes, video: VideoSpec, max_tiles: int = 1) -> torch.Tensor:
    """Return what the tower makes of the frames, computed without the service."""
    config = read_config(TINY)
    tower = load_tower(Checkpoint(TINY), TowerConfig.of(config), torch.device("cpu"), torch.float32).tower
    tiling = TilingSpec.of(config).adjusted(max_tiles, None)
    picture = prepare(source_of("pyav")(content, LIMITS), video, tiling, LIMITS)
    tokens: torch.Tensor = tower(torch.from_numpy(picture.tiles.copy())).flatten(0, 1)
    return tokens


async def test_a_video_is_one_embedding_of_its_frames_in_order(tmp_path: Path) -> None:
    async with replica(tmp_path) as at:
        response = await encode_video(at, CLIP, segment_count=4)
        handle = response.handle
        assert [frame.index for frame in response.frames] == [7, 22, 37, 51]
        assert [frame.time_seconds for frame in response.frames] == pytest.approx([0.28, 0.88, 1.48, 2.04])
        assert (handle.frame_count, handle.tile_count, handle.token_count) == (4, 4, 16)
        assert (response.width, response.height, response.columns, response.rows) == (160, 96, 1, 1)
        tokens = visual_tokens_of(await at.fetch(handle))
        torch.testing.assert_close(tokens, expected_tokens(CLIP, VideoSpec(4)), atol=1e-5, rtol=0.0)


async def test_a_video_takes_eight_frames_of_one_tile_unless_told_otherwise(tmp_path: Path) -> None:
    async with replica(tmp_path) as at:
        usual = await encode_video(at, CLIP)
        finer = await encode_video(at, CLIP, segment_count=3, max_tiles=6)
        bare = await encode_video(at, CLIP, segment_count=3, max_tiles=6, thumbnail=False)
        part = await encode_video(at, CLIP, segment_count=2, start_seconds=1.0, end_seconds=2.0)
        assert (usual.handle.frame_count, usual.handle.tile_count) == (8, 8)
        assert (finer.columns, finer.rows, finer.handle.tile_count) == (3, 2, 3 * 7)
        assert bare.handle.tile_count == 3 * 6
        assert [frame.index for frame in part.frames] == [31, 43]
        assert len({response.handle.digest for response in (usual, finer, bare, part)}) == 4
        tokens = visual_tokens_of(await at.fetch(finer.handle))
        torch.testing.assert_close(tokens, expected_tokens(CLIP, VideoSpec(3), 6), atol=1e-5, rtol=0.0)


async def test_a_video_found_in_memory_or_in_the_store_answers_all_that_its_encode_did(tmp_path: Path) -> None:
    with valkey() as server:
        async with replica(tmp_path, redis_url=server.connection_url) as first:
            encoded = await encode_video(first, CLIP)
            again = await encode_video(first, None, digest_of(CLIP))
        async with replica(tmp_path, redis_url=server.connection_url) as second:
            found = await encode_video(second, None, digest_of(CLIP))
            tiers = [response.cache_tier for response in (encoded, again, found)]
            assert tiers == [CACHE_TIER_NONE, CACHE_TIER_LOCAL, CACHE_TIER_STORE]
            for response in (again, found):
                assert list(response.frames) == list(encoded.frames)
                assert response.handle.frame_count == 8
                assert (response.width, response.columns) == (encoded.width, encoded.columns)
            assert len(visual_tokens_of(await second.fetch(found.handle))) == 32


@pytest.mark.parametrize("name", ["vp9 webm", "mpeg4 avi B-frames", "h264 mov", "h265 mp4", "h264 mp4 cut"])
async def test_every_container_is_taken(tmp_path: Path, name: str) -> None:
    async with replica(tmp_path) as at:
        response = await encode_video(at, content_of(name), segment_count=5)
        tokens = visual_tokens_of(await at.fetch(response.handle))
        expected = expected_tokens(content_of(name), VideoSpec(5))
        torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0.0)
        assert response.frames[-1].index < len(CLIPS[name].numbers)


@pytest.mark.skipif(find_spec("decord") is None, reason="decord has wheels for x86-64 only")
async def test_the_decoder_is_a_setting_and_part_of_the_identity(tmp_path: Path) -> None:
    content = content_of("h264 mp4 cut")
    async with replica(tmp_path) as at:
        exact = await encode_video(at, content)
    async with replica(tmp_path, video_decoder="decord") as at:
        reference = await encode_video(at, content)
    assert exact.handle.digest != reference.handle.digest
    assert exact.frames[-1].index < 43  # what the edit list shows
    assert reference.frames[-1].index >= 43  # what decord counts


async def test_pictures_and_videos_of_the_same_bytes_are_told_apart(tmp_path: Path) -> None:
    async with replica(tmp_path) as at:
        assert type(await error_of(at.encode(CLIP))) is MediaUnreadable
        assert (await encode_video(at, CLIP)).handle.frame_count == 8
        gif = (GOLDEN / "images/animated.gif").read_bytes()
        assert (await at.encode(gif)).handle.frame_count == 0
        assert type(await error_of(encode_video(at, gif))) is MediaUnreadable


async def test_bad_options_are_refused_by_field(tmp_path: Path) -> None:
    bad: dict[str, list[dict[str, Any]]] = {
        f"{FIELD}.segment_count": [{"segment_count": count} for count in (-1, 0, 33, 10_000)],
        f"{FIELD}.start_seconds": [{"start_seconds": float("nan")}, {"start_seconds": float("-inf")}],
        f"{FIELD}.end_seconds": [{"end_seconds": float("inf")}, {"start_seconds": 2.0, "end_seconds": 1.0}],
        "header.options.max_tiles": [{"max_tiles": 0}, {"max_tiles": 41}],
    }
    async with replica(tmp_path, max_video_frames=32) as at:
        for field, cases in bad.items():
            for options in cases:
                error = await error_of(encode_video(at, CLIP, **options))
                assert (type(error), error.field) == (InvalidRequest, field), options


async def test_videos_that_cannot_be_encoded_get_their_reason(tmp_path: Path) -> None:
    many_frames = clips.claiming(content_of("h264 mp4"), 10**9)
    cases: list[tuple[type[ServiceError], bytes, dict[str, Any]]] = [
        (VideoRangeEmpty, CLIP, {"start_seconds": 100.0}),
        (VideoRangeEmpty, CLIP, {"end_seconds": -5.0}),
        (VideoRangeEmpty, CLIP, {"start_seconds": 1e300, "end_seconds": 1e301}),
        (MediaUnreadable, b"no video", {}),
        (MediaUnreadable, CLIP[:-100], {}),
        (MediaUnreadable, clips.sound_only(), {}),
        (MediaTooLarge, many_frames, {}),
        (MediaTooLarge, CLIP, {"segment_count": 20}),
        (MediaTooLarge, CLIP, {"segment_count": 3, "max_tiles": 6}),
        (MediaTooLarge, bytes(200_001), {}),
    ]
    async with replica(tmp_path, max_video_tiles=19, max_video_bytes=200_000) as at:
        for expected, content, options in cases:
            assert type(await error_of(encode_video(at, content, **options))) is expected, (expected, options)
        assert (await encode_video(at, CLIP)).handle.frame_count == 8


async def test_one_video_too_many_is_told_to_come_back(tmp_path: Path) -> None:
    long = clips.encode(Clip("avi", "mjpeg", 800, pixel_format="yuvj420p"))
    async with replica(tmp_path, max_pending_videos=1) as at:
        outcomes = await asyncio.gather(
            *(encode_video(at, long, segment_count=count) for count in range(1, 5)), return_exceptions=True
        )
        refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert refused
        error = await _status_of(refused[0])
        assert type(error) is QueueFull
        assert error.retry_after_s == 1.0


async def test_asking_for_videos_needs_no_room_among_those_that_are_encoded(tmp_path: Path) -> None:
    async with replica(tmp_path, max_pending_videos=1) as at:
        for count in range(1, 6):
            await encode_video(at, CLIP, segment_count=count)
        known = await asyncio.gather(
            *(encode_video(at, None, digest_of(CLIP), segment_count=count) for count in range(1, 6))
        )
        assert {response.cache_tier for response in known} == {CACHE_TIER_LOCAL}
        unknown = await asyncio.gather(
            *(encode_video(at, None, digest_of(bytes([number]))) for number in range(5)), return_exceptions=True
        )
        assert [type(await _status_of(outcome)) for outcome in unknown] == [EmbeddingNotFound] * 5  # type: ignore[arg-type]


async def test_a_video_that_no_cache_can_keep_is_too_large(tmp_path: Path) -> None:
    async with replica(tmp_path) as at:
        handle = (await encode_video(at, CLIP, segment_count=1)).handle
    tile_bytes = handle.token_count * handle.hidden_size * 4
    async with replica(tmp_path, local_cache_bytes=6 * tile_bytes + 1) as at:
        error = await error_of(encode_video(at, CLIP, segment_count=7))
        assert type(error) is MediaTooLarge
        kept = await encode_video(at, CLIP, segment_count=6)
        assert len(visual_tokens_of(await at.fetch(kept.handle))) == 6 * handle.token_count
    with valkey() as server:
        async with replica(tmp_path, redis_url=server.connection_url, local_cache_bytes=0) as at:
            kept = await encode_video(at, CLIP, segment_count=7)
            assert len(visual_tokens_of(await at.fetch(kept.handle))) == 7 * handle.token_count


async def test_a_service_that_can_keep_nothing_does_not_start() -> None:
    async with lifespan(VisionSettings(model=TINY, local_cache_bytes=0), "here:1") as application:
        with pytest.raises(CheckpointError, match="--local-cache-bytes"):
            await application.warm_up()


async def _status_of(raised: BaseException) -> ServiceError:
    async def again() -> None:
        raise raised

    return await error_of(again())


async def test_a_video_of_many_tiles_and_pictures_beside_it_are_encoded(tmp_path: Path) -> None:
    pictures = [path.read_bytes() for path in sorted((GOLDEN / "images").glob("rgb_*"))]
    async with replica(tmp_path, max_batch_tiles=4) as at:
        video, *others = await asyncio.gather(
            encode_video(at, CLIP, segment_count=60), *(at.encode(content) for content in pictures)
        )
        assert all(response.handle.token_count for response in others)
        tokens = visual_tokens_of(await at.fetch(video.handle))
        torch.testing.assert_close(tokens, expected_tokens(CLIP, VideoSpec(60)), atol=1e-5, rtol=0.0)


async def test_two_replicas_of_the_tower_answer_as_one_does(tmp_path: Path) -> None:
    pictures = [path.read_bytes() for path in sorted((GOLDEN / "images").glob("*.png"))]
    digests: list[list[str]] = []
    tensors: list[list[torch.Tensor]] = []
    for devices in ("cpu", "cpu,cpu"):
        async with replica(tmp_path, devices=devices, max_batch_tiles=2) as at:
            responses = await asyncio.gather(
                *(at.encode(content) for content in pictures), encode_video(at, CLIP, segment_count=16)
            )
            digests.append([response.handle.digest for response in responses])
            tensors.append([visual_tokens_of(await at.fetch(response.handle)) for response in responses])
    assert digests[0] == digests[1]
    for one, two in zip(*tensors, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0.0)


async def test_the_policy_decides_what_is_seen_and_is_part_of_the_identity(tmp_path: Path) -> None:
    turned = (GOLDEN / "images/exif_orientation6.jpg").read_bytes()
    async with replica(tmp_path) as at:
        card = await at.encode(turned)
    async with replica(tmp_path, image_policy="viewer") as at:
        viewer = await at.encode(turned)
    assert (viewer.width, viewer.height) == (card.height, card.width)
    assert viewer.handle.digest != card.handle.digest


async def test_a_decoder_that_is_not_installed_stops_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(CheckpointError, match=r"--video-decoder decord: install internvl-serving\[decord\]"):
        async with lifespan(VisionSettings(model=TINY, video_decoder="decord"), "here:1"):
            pass
