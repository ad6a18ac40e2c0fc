"""Settings of the vision service; environment variables begin with `VISION_`."""

from pathlib import Path

from pydantic import DirectoryPath, Field
from pydantic_settings import SettingsConfigDict

from shared.quantize import Quantization
from shared.settings import DtypeName, EmbeddingStoreSettings, ServiceSettings
from vision_service.maker import Storage
from vision_service.preprocess.frames import DecoderName
from vision_service.preprocess.tiling import Policy

# Pillow itself warns above this many pixels and refuses twice as many; our limit has to be the tighter one.
_PILLOW_MAX_PIXELS = 89_478_485
_DEVICE = r"(cpu|cuda(:\d+)?)"


class VisionSettings(ServiceSettings, EmbeddingStoreSettings):
    """What the vision service serves, on what, and how much of it at once."""

    model_config = SettingsConfigDict(env_prefix="VISION_", cli_shortcuts={"devices": "device"})

    model: DirectoryPath = Field(description="checkpoint directory (config.json and safetensors)")
    devices: str = Field(
        "auto",
        pattern=rf"^(auto|{_DEVICE}(,{_DEVICE})*)$",
        description="where the vision tower runs, once on each: cpu, cuda, or several as in cuda:0,cuda:1; auto is one",
    )
    dtype: DtypeName = Field("auto", description="auto: float32 on a CPU, bfloat16 on a GPU")
    quantization: Quantization = Field(
        "none",
        description="int8 and nf4 keep the matrices of the vision transformer in 8 and 4 bits, with bitsandbytes",
    )
    threads: int = Field(0, ge=0, description="CPU threads that the model may use; 0: torch's choice")
    cpu_nice: int = Field(
        0, ge=0, le=19, description="how far a model on a CPU gives way to other processes; at 10 it gets a tenth"
    )
    neighbour_file: Path | None = Field(
        None,
        description="file by which a language model on the same processors learns that pictures are being encoded, "
        "and leaves room for it (its own neighbour_file)",
    )
    work_threads: int = Field(2, ge=1, description="threads that hash media and put embeddings together")

    image_policy: Policy = Field(
        "card", description="card: pictures as the model cards' code reads them; viewer: as a person sees them"
    )

    picture_processes: int = Field(
        2, ge=1, description="pictures that are decoded at a time, each in a process of its own"
    )
    picture_timeout_s: float = Field(10.0, gt=0, description="seconds that the decoding of a picture may take")
    picture_memory_bytes: int = Field(
        2 << 30, ge=1 << 29, description="address space of a process that decodes pictures"
    )
    max_media_bytes: int = Field(32 << 20, ge=1, description="largest picture, in bytes as uploaded")
    max_pixels: int = Field(
        40_000_000, ge=1, le=_PILLOW_MAX_PIXELS, description="largest picture or video frame, in pixels"
    )
    max_tiles_limit: int = Field(40, ge=1, description="most tiles a request may ask for, without the thumbnail")
    max_batch_tiles: int = Field(
        0, ge=0, description="most tiles in one forward pass; 0: 16 on a GPU, 1 on a CPU, where more gain nothing"
    )
    max_queued_tiles: int = Field(512, ge=1, description="most tiles that wait for the vision tower")
    max_pending_pictures: int = Field(64, ge=1, description="most pictures held in memory on their way to an embedding")

    embedding_storage: Storage = Field(
        "plain", description="int8 keeps embeddings in half the bytes and very nearly as they are; see the decisions"
    )
    encoding_lease_s: float = Field(
        5.0, gt=0.1, description="seconds after which another replica encodes what a replica that died was encoding"
    )

    video_decoder: DecoderName = Field(
        "pyav", description="pyav: exact; decord: the model cards' choice, which returns wrong frames of some videos"
    )
    video_processes: int = Field(2, ge=1, description="videos that are decoded at a time, each in a process of its own")
    video_timeout_s: float = Field(60.0, gt=0, description="seconds that the decoding of a video may take")
    video_memory_bytes: int = Field(4 << 30, ge=1 << 29, description="address space of a process that decodes videos")
    max_video_bytes: int = Field(128 << 20, ge=1, le=1 << 31, description="largest video, in bytes as uploaded")
    max_video_frames: int = Field(64, ge=1, le=1024, description="most frames of a video that a request may ask for")
    max_video_tiles: int = Field(
        256, ge=1, le=4096, description="most tiles of all those frames together; fewer where no cache can keep so many"
    )
    max_clip_frames: int = Field(500_000, ge=1, description="most frames that a video may have, seen or not")
    max_clip_s: float = Field(7200.0, gt=0, description="longest video, in seconds")
    max_pending_videos: int = Field(4, ge=1, description="most videos held in memory on their way to an embedding")
