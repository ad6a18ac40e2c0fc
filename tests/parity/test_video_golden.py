"""Frames of videos are chosen and cut as the model cards' code does it (tests/golden/video)."""

import hashlib
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.errors import VideoRangeEmpty
from vision_service.batcher import Deadline
from vision_service.model.tower import pixel_values
from vision_service.preprocess.frames import VideoSpec, choose_frames
from vision_service.preprocess.image import Picture
from vision_service.preprocess.tiling import TilingSpec
from vision_service.video.preparation import prepare, source_of
from vision_service.video.source import VideoLimits
from vision_service.workers.pool import MediaPool
from vision_service.workers.settings import VideoWork, WorkerSettings

GOLDEN = Path(__file__).parents[1] / "golden"
CLIPS: list[dict[str, Any]] = json.loads((GOLDEN / "video/video.json").read_text())["clips"]
RUNS = [(clip, run) for clip in CLIPS for run in clip["runs"]]
LIMITS = VideoLimits(max_pixels=1_000_000, max_clip_frames=1000, max_clip_s=100, max_tiles=100)


def content_of(clip: dict[str, Any]) -> bytes:
    return (GOLDEN / "video" / clip["file"]).read_bytes()


def spec_of(run: dict[str, Any]) -> tuple[VideoSpec, TilingSpec]:
    start_s, end_s = run["bound"] or (None, None)
    return VideoSpec(run["num_segments"], start_s, end_s), TilingSpec(run["image_size"], 1, run["max_num"], True)


def name_of(value: dict[str, Any]) -> str:
    return value.get("file") or f"{value['num_segments']} {value['bound']} {value['max_num']} {value['image_size']}"


def check(picture: Picture, run: dict[str, Any], tolerance: float) -> None:
    assert [frame.index for frame in picture.frames] == run["indices"]
    assert len(picture.tiles) == sum(run["num_patches_list"])
    values = pixel_values(torch.from_numpy(picture.tiles.copy()))
    assert list(values.shape) == run["pixel_values_shape"]
    assert float(values.mean()) == pytest.approx(run["pixel_values_mean"], abs=tolerance)


def test_the_chosen_frames_are_the_cards() -> None:
    table = json.loads((GOLDEN / "preprocess/video_indices.json").read_text())
    rows = [row for row in table if row["first_idx"] == 0]  # the reference's other uses
    assert len(rows) > 200
    for row in rows:
        spec = VideoSpec(row["num_segments"], *(row["bound"] or (None, None)))
        if row["out_of_range"]:
            with pytest.raises(VideoRangeEmpty):
                choose_frames(row["n_frames"], row["fps"], spec)
        else:
            assert choose_frames(row["n_frames"], row["fps"], spec) == row["indices"], row


@pytest.mark.parametrize(("clip", "run"), RUNS, ids=name_of)
def test_pyav_sees_what_the_card_sees(clip: dict[str, Any], run: dict[str, Any]) -> None:
    source = source_of("pyav")(content_of(clip), LIMITS)
    assert (source.frame_count, source.rate) == (clip["n_frames"], clip["avg_fps"])
    for frame in source.frames(run["indices"]):
        mean = run["frame_mean_rgb"][run["indices"].index(frame.index)]
        assert list(frame.rgb.shape) == clip["shape"]
        assert np.abs(frame.rgb.mean(axis=(0, 1)) - mean).max() < 0.5
    video, tiling = spec_of(run)
    check(prepare(source, video, tiling, LIMITS), run, tolerance=0.01)


@pytest.fixture
def decord_pool() -> Iterator[MediaPool]:
    work = VideoWork("decord", LIMITS)
    pool = MediaPool(WorkerSettings(work, timeout_s=60, memory_bytes=4 << 30, max_media=100), processes=1)
    yield pool
    pool.close()


@pytest.mark.skipif(find_spec("decord") is None, reason="decord has wheels for x86-64 only")
async def test_decord_gives_the_cards_pixel_values_bit_for_bit(decord_pool: MediaPool) -> None:
    for clip, run in RUNS:
        video, tiling = spec_of(run)
        spec = VideoSpec(video.segment_count, video.start_s, video.end_s, "decord")
        picture = await decord_pool.prepare(content_of(clip), tiling, spec, Deadline(None))
        check(picture, run, tolerance=1e-6)
        values = pixel_values(torch.from_numpy(picture.tiles.copy())).numpy()
        assert hashlib.sha256(values.tobytes()).hexdigest() == run["pixel_values_sha256"]


def test_pyav_makes_the_tiles_of_the_recorded_conversations() -> None:
    from safetensors.numpy import load_file

    from shared.checkpoint import read_config

    found = 0
    for cases_file in sorted((GOLDEN / "expected").glob("*/cases.json")):
        tensors = load_file(cases_file.parent / "case_tensors.safetensors")
        config = read_config(GOLDEN / "checkpoints" / cases_file.parent.name)
        for case in json.loads(cases_file.read_text())["cases"]:
            if "video" not in case or f"video.{case['name']}.pixel_u8" not in tensors:
                continue
            asked = case["video"]
            source = source_of("pyav")((GOLDEN / "video" / asked["file"]).read_bytes(), LIMITS)
            tiling = TilingSpec.of(config).adjusted(asked["max_num"], None)
            picture = prepare(source, VideoSpec(asked["num_segments"]), tiling, LIMITS)
            expected = tensors[f"video.{case['name']}.pixel_u8"]
            assert np.abs(picture.tiles.astype(int) - expected).max() <= 2
            found += 1
    assert found >= 3
