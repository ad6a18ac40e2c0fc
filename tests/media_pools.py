"""Pools of media workers for tests, and workers that do what their medium says."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from vision_service.batcher import Deadline
from vision_service.preprocess.frames import DecoderName
from vision_service.preprocess.image import Picture
from vision_service.preprocess.tiling import TilingSpec
from vision_service.video.source import VideoLimits
from vision_service.workers.pool import MediaPool
from vision_service.workers.process import WORKER
from vision_service.workers.settings import PictureWork, VideoWork, Work, WorkerSettings

NEVER = Deadline(None)
CLIP_LIMITS = {"max_pixels": 1_000_000, "max_clip_frames": 10_000, "max_clip_s": 1000.0, "max_tiles": 100}

# A worker that does what its medium says: crash, end, hang, talk nonsense, lie, or tell its process id as the width.
SCRIPTED_WORKER = """
import os, signal, socket, sys, time
from vision_service.workers.channel import Channel
stream = socket.socket(fileno=0)
channel = Channel(stream)
channel.send({"locked": True})
while True:
    _, content = channel.receive()
    order = bytes(content).decode()
    if order == "crash": os.kill(os.getpid(), signal.SIGSEGV)
    if order == "out of memory": os.kill(os.getpid(), signal.SIGKILL)
    if order == "end": sys.exit(1)
    if order == "hang": time.sleep(1000)
    if order == "babble": stream.sendall(b"?" * 100); time.sleep(1000)
    if order == "nest": stream.sendall((50000).to_bytes(4, "little") + bytes(8) + b"[" * 50000); time.sleep(1000)
    if order == "refuse": channel.send({"reason": "MEDIA_UNREADABLE", "message": "No."}); continue
    if order == "invent": channel.send({"reason": "NONE_OF_OURS", "message": "No."}); continue
    if order == "forget": channel.send({"width": 1}); continue
    tiles = 7 if order == "exaggerate" else 1
    answer = {"width": os.getpid(), "height": 1, "columns": 1, "rows": 1, "frames": []}
    channel.send(answer, bytes(tiles * 28 * 28 * 3))
"""
# The same, tied to the life of its service as real workers are.
TIED_WORKER = "from vision_service.workers import confinement; confinement.die_with_parent()" + SCRIPTED_WORKER
SCRIPTED = (sys.executable, "-c", SCRIPTED_WORKER)
TIED = (sys.executable, "-c", TIED_WORKER)
SCRIPTED_TILING = TilingSpec(28, 1, 1, thumbnail=True)


def picture_work(max_pixels: int = 1_000_000) -> PictureWork:
    """Return the work of a pool of pictures."""
    return PictureWork(max_pixels)


def video_work(decoder: DecoderName = "pyav", **limits: Any) -> VideoWork:
    """Return the work of a pool of videos, with the limits given and small ones otherwise."""
    return VideoWork(decoder, VideoLimits(**(CLIP_LIMITS | limits)))


@asynccontextmanager
async def media_pool(
    work: Work | None = None,
    processes: int = 1,
    timeout_s: float = 60,
    memory_bytes: int = 4 << 30,
    command: tuple[str, ...] = WORKER,
    start_timeout_s: float = 60,
    max_media: int = 100,
) -> AsyncIterator[MediaPool]:
    """Yield a pool, of pictures unless told otherwise; it is closed in the end."""
    settings = WorkerSettings(work or picture_work(), timeout_s, memory_bytes, max_media, start_timeout_s)
    opened = MediaPool(settings, processes, command)
    try:
        yield opened
    finally:
        opened.close()


async def told(at: MediaPool, order: bytes = b"tell") -> int:
    """Give a scripted worker an order; return its process id."""
    picture: Picture = await at.prepare(order, SCRIPTED_TILING, None, NEVER)
    return picture.width
