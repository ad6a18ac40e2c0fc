"""Puts the vision service together and takes it apart again."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from importlib.util import find_spec
from typing import NoReturn

import numpy as np
import structlog
import torch

from internvl_serving.vision.v1 import vision_service_pb2, vision_service_pb2_grpc
from shared.checkpoint import Checkpoint, InternVLConfig, read_config
from shared.embedding import MAX_SIZE_BYTES
from shared.errors import CheckpointError
from shared.rpc.server import Application
from shared.store import LocalEmbeddingCache, connect_redis, open_embedding_store
from shared.tensors import resolve_device, resolve_dtype
from vision_service.batcher import Batcher
from vision_service.encoder import EmbeddingLimits, Encoder, PendingLimits
from vision_service.model.loader import LoadedTower, load_tower
from vision_service.model.tower import TowerConfig
from vision_service.preparer import MediaPreparer
from vision_service.preprocess.frames import DecoderName
from vision_service.preprocess.tiling import TilingSpec
from vision_service.runner import ModelRunner, WorkerPool
from vision_service.servicer import VisionServicer
from vision_service.settings import VisionSettings
from vision_service.video.pool import VideoPool, WorkerSettings
from vision_service.video.source import VideoLimits

log = structlog.get_logger()
SERVICE = vision_service_pb2.DESCRIPTOR.services_by_name["VisionService"].full_name


@asynccontextmanager
async def lifespan(settings: VisionSettings, address: str) -> AsyncIterator[Application]:
    """Yield the service, to be reached by others under `address`; the model is loaded by `warm_up`.

    Raises `CheckpointError` when config.json does not describe a model that can be served, and when the decoder of
    videos is not installed.
    """
    config = read_config(settings.model)
    TowerConfig.of(config)
    limits = _embedding_limits(settings, config)
    _require_decoder(settings.video_decoder)
    async with AsyncExitStack() as stack:
        redis = connect_redis(settings.redis_url, settings.redis_timeout_s) if settings.redis_url else None
        if redis is not None:
            stack.push_async_callback(redis.aclose)
        runners = [ModelRunner(partial(_load, settings, config, name)) for name in settings.devices.split(",")]
        for runner in runners:
            stack.callback(runner.close)
        workers = WorkerPool(settings.decode_threads, "decode")
        stack.callback(workers.close)
        videos = VideoPool(_worker_settings(settings), settings.video_processes)
        stack.callback(videos.close)
        batcher = Batcher(runners, settings.max_batch_tiles, settings.max_queued_tiles)
        stack.push_async_callback(_cancel, asyncio.create_task(batcher.run()))
        encoder = Encoder(
            batcher,
            MediaPreparer(workers, videos, settings.max_pixels),
            workers,
            open_embedding_store(redis, settings),
            LocalEmbeddingCache(settings.local_cache_bytes),
            PendingLimits(settings.max_pending_pictures, settings.max_pending_videos),
            limits,
        )
        stack.push_async_callback(encoder.close)
        spec = TilingSpec.of(config, settings.image_policy)
        servicer = VisionServicer(encoder, spec, settings, address)
        yield Application(
            register=lambda server: vision_service_pb2_grpc.add_VisionServiceServicer_to_server(servicer, server),
            services=[SERVICE],
            warm_up=partial(_warm_up, runners, config, limits),
        )


async def _cancel(task: asyncio.Task[NoReturn]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _warm_up(runners: Sequence[ModelRunner], config: InternVLConfig, limits: EmbeddingLimits) -> None:
    started = time.monotonic()
    replicas = await asyncio.gather(*(runner.load() for runner in runners))
    if len({runner.identity for runner in runners}) > 1:
        raise CheckpointError("--devices: embeddings would differ from device to device; set one --dtype for all.")
    most_tiles = limits.max_tiles(runners[0].identity.data_type)
    if most_tiles < 1:
        raise CheckpointError(
            "--local-cache-bytes: without --redis-url it has to hold an embedding of one tile at least."
        )
    picture = np.zeros((1, config.image_size, config.image_size, 3), np.uint8)
    await asyncio.gather(*(runner.encode([picture]) for runner in runners))
    loaded = replicas[0]
    log.info(
        "model_loaded",
        model=config.name,
        seconds=round(time.monotonic() - started, 1),
        parameters=loaded.num_parameters,
        device=",".join(str(replica.device) for replica in replicas),
        dtype=str(loaded.dtype).removeprefix("torch."),
        fingerprint=loaded.fingerprint,
        most_tiles=most_tiles,
    )


def _load(settings: VisionSettings, config: InternVLConfig, device_name: str) -> LoadedTower:
    """Load the tower onto a device; runs on the thread of that replica."""
    if settings.threads:
        torch.set_num_threads(settings.threads)  # counts for the thread that calls it
    device = resolve_device(device_name)
    dtype = resolve_dtype(settings.dtype, device)
    return load_tower(Checkpoint(settings.model), TowerConfig.of(config), device, dtype, settings.quantization)


def _embedding_limits(settings: VisionSettings, config: InternVLConfig) -> EmbeddingLimits:
    """Return what can be kept: as much as the store takes, or without one as much as fits into this process's cache."""
    most_bytes = MAX_SIZE_BYTES if settings.redis_url else settings.local_cache_bytes
    return EmbeddingLimits(config.tokens_per_tile, config.hidden_size, most_bytes)


def _require_decoder(decoder: DecoderName) -> None:
    """Raise `CheckpointError` where the decoder is not installed; it is loaded in processes of its own only."""
    module, extra = {"pyav": ("av", "vision"), "decord": ("decord", "decord")}[decoder]
    if find_spec(module) is None:
        raise CheckpointError(f"--video-decoder {decoder}: install internvl-serving[{extra}].")


def _worker_settings(settings: VisionSettings) -> WorkerSettings:
    limits = VideoLimits(settings.max_pixels, settings.max_clip_frames, settings.max_clip_s, settings.max_video_tiles)
    return WorkerSettings(settings.video_decoder, limits, settings.video_timeout_s, settings.video_memory_bytes)
