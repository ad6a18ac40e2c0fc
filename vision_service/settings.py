"""Settings of the vision service; environment variables begin with `VISION_`."""

from pydantic import DirectoryPath, Field
from pydantic_settings import SettingsConfigDict

from shared.settings import DtypeName, EmbeddingStoreSettings, ServiceSettings

# Pillow itself warns above this many pixels and refuses twice as many; our limit has to be the tighter one.
_PILLOW_MAX_PIXELS = 89_478_485


class VisionSettings(ServiceSettings, EmbeddingStoreSettings):
    """What the vision service serves, on what, and how much of it at once."""

    model_config = SettingsConfigDict(env_prefix="VISION_")

    model: DirectoryPath = Field(description="checkpoint directory (config.json and safetensors)")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    dtype: DtypeName = Field("auto", description="auto: float32 on a CPU, bfloat16 on a GPU")
    threads: int = Field(0, ge=0, description="CPU threads that the model may use; 0: torch's choice")
    decode_threads: int = Field(2, ge=1, description="threads that decode pictures and cut tiles")

    max_media_bytes: int = Field(32 << 20, ge=1, description="largest picture, in bytes as uploaded")
    max_pixels: int = Field(40_000_000, ge=1, le=_PILLOW_MAX_PIXELS, description="largest picture, in pixels")
    max_tiles_limit: int = Field(40, ge=1, description="most tiles a request may ask for, without the thumbnail")
    max_batch_tiles: int = Field(16, ge=1, description="most tiles in one forward pass")
    max_queued_tiles: int = Field(512, ge=1, description="most tiles that wait for the vision tower")
    max_pending_pictures: int = Field(64, ge=1, description="most pictures held in memory on their way to an embedding")
