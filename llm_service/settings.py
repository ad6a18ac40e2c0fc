"""Settings of the LLM service."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from shared.quantize import Quantization
from shared.settings import DtypeName, EmbeddingStoreSettings, ServiceSettings, StageTlsSettings


class LlmSettings(ServiceSettings, EmbeddingStoreSettings, StageTlsSettings):
    """Everything that can be set, from flags, `LLM_*` variables or these defaults."""

    model_config = SettingsConfigDict(env_prefix="LLM_", cli_shortcuts={"devices": "device"})

    model: Path = Field(description="checkpoint directory: config.json, safetensors and tokenizer files")
    devices: str = Field(
        "auto",
        pattern=r"^[^,]+(,[^,]+)*$",
        description="torch device, such as cpu, cuda or cuda:1, or several that share the layers, as in cuda:0,cuda:1; "
        "auto takes a GPU if there is one",
    )
    vit_shares_first_device: bool = Field(
        False, description="leave half of the first device to a vision service that runs on it too"
    )
    dtype: DtypeName = Field("auto", description="element type; auto is float32 on a CPU and bfloat16 on a GPU")
    quantization: Quantization = Field(
        "none", description="int8 and nf4 keep the matrices of the layers in 8 and 4 bits, with bitsandbytes"
    )
    threads: int = Field(0, ge=0, description="CPU threads of one operation; 0 leaves torch's default")
    kv_cache_bytes: int = Field(
        0,
        ge=0,
        description="memory for keys and values; 0 takes 1 GiB on a CPU and 85 percent of what is free on a GPU",
    )
    block_size: int = Field(
        0,
        ge=0,
        le=256,
        description="tokens of one block of the KV cache, the grain in which prompts are kept; 0 takes 16, or what "
        "flash-attn reads, 256, where that is installed beside a GPU",
    )
    max_context_tokens: int = Field(
        0, ge=0, description="most tokens of prompt and answer together; 0 takes the checkpoint's limit"
    )
    max_sequences: int = Field(64, ge=1, description="sequences in one step")
    max_batch_tokens: int = Field(2048, ge=64, description="tokens in one step; longer prompts are read in chunks")
    max_step_seconds: float = Field(
        0.2,
        gt=0,
        description="how long a step may take while answers are streamed, or five times that while none is: on slow "
        "machines the chunks of prompts are smaller than max_batch_tokens, so that no stream stands still for longer",
    )
    neighbour_file: Path | None = Field(
        None,
        description="file by which a vision service on the same processors says that it encodes pictures; answers then "
        "go on at a token per max_step_seconds, so that whoever waits for a picture waits less",
    )
    stream_interval_seconds: float = Field(
        0.02,
        ge=0,
        description="least time between two messages of one answer; tokens that come sooner share one, which costs the "
        "services and the client less",
    )
    max_open_requests: int = Field(2048, ge=1, description="requests at a time; more are refused with QUEUE_FULL")
    max_embedding_bytes: int = Field(
        2 << 30, ge=1, description="memory for the embeddings of answers in progress; more wait for it"
    )
    default_output_tokens: int = Field(1024, ge=1, description="max_output_tokens of a request that does not say")
