"""Puts the vision service together and takes it apart again."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from importlib.util import find_spec
from typing import Final

import numpy as np
import structlog
import torch
from redis.asyncio import Redis

from internvl_serving.vision.v1 import vision_service_pb2, vision_service_pb2_grpc
from shared.announcements import Announcements
from shared.busy_sign import BusySign, Side
from shared.checkpoint import Checkpoint, InternVLConfig, read_config
from shared.embedding import MAX_SIZE_BYTES
from shared.erasures import CHANNEL as ERASED
from shared.erasures import Erasures
from shared.errors import CheckpointError
from shared.local_cache import LocalEmbeddingCache
from shared.metrics import NO_METRICS, Registry
from shared.redis_link import open_link
from shared.rpc.handles import HandleSigner
from shared.rpc.server import Application
from shared.service_status import ModelStatus, ProcessStatus
from shared.store import NoEmbeddingStore, RedisEmbeddingStore, open_embedding_store
from shared.store_metrics import StoreMetrics
from shared.tasks import cancelled
from shared.tensors import resolve_device, resolve_dtype
from vision_service.batcher import Batcher
from vision_service.convert import HandleIssuer
from vision_service.encoder import Encoder, PendingLimits
from vision_service.fleet import CHANNEL as ENCODED
from vision_service.fleet import NoFleet, RedisFleet
from vision_service.flights import Caches
from vision_service.maker import EmbeddingLimits, EmbeddingMaker
from vision_service.metrics import VisionMetrics
from vision_service.model.loader import LoadedTower, load_tower
from vision_service.model.tower import TowerConfig
from vision_service.preparer import MediaPreparer
from vision_service.preprocess.frames import DecoderName
from vision_service.preprocess.tiling import TilingSpec
from vision_service.priority import lower_priority
from vision_service.runner import ModelRunner, WorkerPool
from vision_service.servicer import VisionServicer
from vision_service.settings import VisionSettings
from vision_service.video.source import VideoLimits
from vision_service.workers.pool import MediaPool
from vision_service.workers.settings import PictureWork, VideoWork, WorkerSettings

log = structlog.get_logger()
_GPU_BATCH_TILES: Final = 16
_MAX_PICTURES, _MAX_VIDEOS = 1000, 100  # that one process decodes, because decoders leak
SERVICE = vision_service_pb2.DESCRIPTOR.services_by_name["VisionService"].full_name


@asynccontextmanager
async def lifespan(
    settings: VisionSettings, address: str, registry: Registry = NO_METRICS
) -> AsyncIterator[Application]:
    """Yield the service, to be reached by others under `address`; the model is loaded by `warm_up`.

    Raises `CheckpointError` when config.json does not describe a model that can be served, and when the decoder of
    videos is not installed.
    """
    config = read_config(settings.model)
    TowerConfig.of(config)
    limits = _embedding_limits(settings, config)
    _require_decoder(settings.video_decoder)
    async with AsyncExitStack() as stack:
        max_tiles = _max_batch_tiles(settings)
        loads = [partial(_load, settings, config, name) for name in settings.devices.split(",")]
        sign = BusySign.at(settings.neighbour_file, Side.VISION)
        runners = [ModelRunner(load, max_tiles, sign) for load in loads]
        for runner in runners:
            stack.callback(runner.close)
        workers = WorkerPool(settings.work_threads, "work")
        stack.callback(workers.close)
        pictures = MediaPool(_picture_workers(settings), settings.picture_processes)
        stack.callback(pictures.close)
        videos = MediaPool(_video_workers(settings), settings.video_processes)
        stack.callback(videos.close)
        metrics = VisionMetrics.declared(registry)
        batcher = Batcher(runners, max_tiles, settings.max_queued_tiles, metrics=metrics)
        stack.push_async_callback(cancelled, asyncio.create_task(batcher.run()))
        metrics.queued_tiles.follow(lambda: batcher.queued_tiles)
        preparer = MediaPreparer(pictures, videos, config.tokens_per_tile)
        maker = EmbeddingMaker(batcher, preparer, workers, limits, settings.embedding_storage)
        store_metrics = StoreMetrics.declared(registry)
        cache = LocalEmbeddingCache(settings.local_cache_bytes, store_metrics)
        link = await stack.enter_async_context(open_link(settings, store_metrics))
        store = await stack.enter_async_context(open_embedding_store(link, settings))
        fleet = RedisFleet(link, settings.encoding_lease_s, metrics=metrics) if link else NoFleet()
        max_pending = PendingLimits(settings.max_pending_pictures, settings.max_pending_videos)
        encoder = Encoder(maker, Caches(cache, store), fleet, workers, max_pending, metrics)
        stack.push_async_callback(encoder.close)
        if link is not None:
            listening = asyncio.create_task(_announcements(link.redis, fleet, encoder, store).run())
            stack.push_async_callback(cancelled, listening)
        signer = HandleSigner(settings.embedding_key.get_secret_value())
        issuer = HandleIssuer(signer, address, settings.embedding_ttl_s)
        process = ProcessStatus(link.redis if link else None)
        tiling = TilingSpec.of(config, settings.image_policy)
        servicer = VisionServicer(encoder, preparer, issuer, tiling, settings, process)
        yield Application(
            register=lambda server: vision_service_pb2_grpc.add_VisionServiceServicer_to_server(servicer, server),
            services=[SERVICE],
            warm_up=partial(_warm_up, runners, preparer, config, limits, process),
            parts=[runner.progress for runner in runners],
        )


def _announcements(
    redis: Redis, fleet: RedisFleet | NoFleet, encoder: Encoder, store: RedisEmbeddingStore | NoEmbeddingStore
) -> Announcements:
    # What waits to be written is erased, too.
    erasures = Erasures(encoder, store.queue) if isinstance(store, RedisEmbeddingStore) else Erasures(encoder)
    return Announcements(redis, {ENCODED: fleet.hear, ERASED: erasures.hear}, erasures.connected)


async def _warm_up(
    runners: Sequence[ModelRunner],
    preparer: MediaPreparer,
    config: InternVLConfig,
    limits: EmbeddingLimits,
    process: ProcessStatus,
) -> None:
    started = time.monotonic()
    replicas, _ = await asyncio.gather(asyncio.gather(*(runner.load() for runner in runners)), preparer.start())
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
    devices, dtype = ",".join(str(replica.device) for replica in replicas), str(loaded.dtype).removeprefix("torch.")
    process.model = ModelStatus(config.name, config.hidden_size, config.tokens_per_tile, dtype, devices)
    log.info(
        "model_loaded",
        model=config.name,
        seconds=round(time.monotonic() - started, 1),
        parameters=loaded.num_parameters,
        device=devices,
        dtype=dtype,
        fingerprint=loaded.fingerprint,
        most_tiles=most_tiles,
    )


def _load(settings: VisionSettings, config: InternVLConfig, device_name: str) -> LoadedTower:
    """Load the tower onto a device; runs on the thread of that replica."""
    if settings.threads:
        torch.set_num_threads(settings.threads)  # counts for the thread that calls it
    device = resolve_device(device_name)
    if device.type == "cpu":
        lower_priority(settings.cpu_nice)
    dtype = resolve_dtype(settings.dtype, device)
    return load_tower(Checkpoint(settings.model), TowerConfig.of(config), device, dtype, settings.quantization)


def _max_batch_tiles(settings: VisionSettings) -> int:
    on_gpu = any(resolve_device(name).type != "cpu" for name in settings.devices.split(","))
    return settings.max_batch_tiles or (_GPU_BATCH_TILES if on_gpu else 1)


def _embedding_limits(settings: VisionSettings, config: InternVLConfig) -> EmbeddingLimits:
    """Return what can be kept: as much as the store takes, or without one as much as fits into this process's cache."""
    most_bytes = MAX_SIZE_BYTES if settings.redis_url else settings.local_cache_bytes
    return EmbeddingLimits(config.tokens_per_tile, config.hidden_size, most_bytes)


def _require_decoder(decoder: DecoderName) -> None:
    """Raise `CheckpointError` where the decoder is not installed; it is loaded in processes of its own only."""
    module, extra = {"pyav": ("av", "vision"), "decord": ("decord", "decord")}[decoder]
    if find_spec(module) is None:
        raise CheckpointError(f"--video-decoder {decoder}: install internvl-serving[{extra}].")


def _picture_workers(settings: VisionSettings) -> WorkerSettings:
    work = PictureWork(settings.max_pixels)
    return WorkerSettings(work, settings.picture_timeout_s, settings.picture_memory_bytes, _MAX_PICTURES)


def _video_workers(settings: VisionSettings) -> WorkerSettings:
    limits = VideoLimits(settings.max_pixels, settings.max_clip_frames, settings.max_clip_s, settings.max_video_tiles)
    work = VideoWork(settings.video_decoder, limits)
    return WorkerSettings(work, settings.video_timeout_s, settings.video_memory_bytes, _MAX_VIDEOS)
