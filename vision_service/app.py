"""Puts the vision service together and takes it apart again."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import NoReturn

import numpy as np
import structlog
import torch

from internvl_serving.vision.v1 import vision_service_pb2, vision_service_pb2_grpc
from shared.checkpoint import Checkpoint, InternVLConfig, read_config
from shared.rpc.server import Application
from shared.store import LocalEmbeddingCache, connect_redis, open_embedding_store
from shared.tensors import resolve_device, resolve_dtype
from vision_service.batcher import Batcher
from vision_service.encoder import Encoder
from vision_service.model.loader import LoadedTower, load_tower
from vision_service.model.tower import TowerConfig
from vision_service.preprocess.tiling import TilingSpec
from vision_service.runner import ModelRunner, WorkerPool
from vision_service.servicer import VisionServicer
from vision_service.settings import VisionSettings

log = structlog.get_logger()
SERVICE = vision_service_pb2.DESCRIPTOR.services_by_name["VisionService"].full_name


@asynccontextmanager
async def lifespan(settings: VisionSettings, address: str) -> AsyncIterator[Application]:
    """Yield the service, to be reached by others under `address`; the model is loaded by `warm_up`.

    Raises `CheckpointError` when config.json does not describe a model that can be served.
    """
    config = read_config(settings.model)
    TowerConfig.of(config)
    async with AsyncExitStack() as stack:
        redis = connect_redis(settings.redis_url, settings.redis_timeout_s) if settings.redis_url else None
        if redis is not None:
            stack.push_async_callback(redis.aclose)
        runner = ModelRunner(partial(_load, settings, config), settings.max_batch_tiles)
        stack.callback(runner.close)
        workers = WorkerPool(settings.decode_threads, "decode")
        stack.callback(workers.close)
        batcher = Batcher(runner, settings.max_batch_tiles, settings.max_queued_tiles)
        stack.push_async_callback(_cancel, asyncio.create_task(batcher.run()))
        store = open_embedding_store(redis, settings)
        cache = LocalEmbeddingCache(settings.local_cache_bytes)
        encoder = Encoder(batcher, workers, store, cache, settings.max_pixels, settings.max_pending_pictures)
        stack.push_async_callback(encoder.close)
        servicer = VisionServicer(encoder, TilingSpec.of(config), settings, address)
        yield Application(
            register=lambda server: vision_service_pb2_grpc.add_VisionServiceServicer_to_server(servicer, server),
            services=[SERVICE],
            warm_up=partial(_warm_up, runner, config),
        )


async def _cancel(task: asyncio.Task[NoReturn]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _warm_up(runner: ModelRunner, config: InternVLConfig) -> None:
    started = time.monotonic()
    loaded = await runner.load()
    await runner.encode([np.zeros((1, config.image_size, config.image_size, 3), np.uint8)])
    log.info(
        "model_loaded",
        model=config.name,
        seconds=round(time.monotonic() - started, 1),
        parameters=loaded.num_parameters,
        device=str(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        fingerprint=loaded.fingerprint,
    )


def _load(settings: VisionSettings, config: InternVLConfig) -> LoadedTower:
    """Load the tower that the settings name; runs on the model thread."""
    if settings.threads:
        torch.set_num_threads(settings.threads)  # counts for the thread that calls it
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    return load_tower(Checkpoint(settings.model), TowerConfig.of(config), device, dtype)
