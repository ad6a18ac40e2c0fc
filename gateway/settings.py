"""The gateway's settings."""

from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr, ValidationInfo
from pydantic_settings import SettingsConfigDict

from gateway.batches import BatchLimits
from gateway.dialogue import Limits
from shared.settings import RedisUrl, ServiceSettings

_REDIS_URL = "redis://127.0.0.1:6379/0"


def _both_or_neither(target: str, info: ValidationInfo) -> str:
    if bool(target) != bool(info.data.get("critic_vision_target")):
        raise ValueError("a critic has a vision and an LLM service: give both targets or neither")
    return target


class GatewaySettings(ServiceSettings):
    """Where the stages and the store are, and how much one request may ask for."""

    model_config = SettingsConfigDict(env_prefix="GATEWAY_")

    vision_target: str = Field(description="gRPC target of the vision service: host:port, or dns:///name:port")
    llm_target: str = Field(description="gRPC target of the LLM service: host:port, or dns:///name:port")
    critic_vision_target: str = Field("", description="gRPC target of the critic's vision service; empty: no critic")
    critic_llm_target: Annotated[str, AfterValidator(_both_or_neither)] = Field(
        "", validate_default=True, description="gRPC target of the critic's LLM service; empty: no critic"
    )
    redis_url: RedisUrl = Field(
        SecretStr(_REDIS_URL),
        description="redis:// URL of the store of conversations and media; it must not evict. Without it chats that "
        f"carry everything themselves still work. If not given: {_REDIS_URL}",
    )
    redis_timeout_s: float = Field(0.4, gt=0, description="longest wait for one answer of that store")
    conversation_ttl_s: int = Field(86_400, ge=1, description="seconds that a conversation outlives its last turn")
    conversation_lease_s: float = Field(
        15.0, gt=0, description="seconds after which a conversation is free again when its gateway has died"
    )
    media_ttl_s: int = Field(604_800, ge=1, description="seconds that the bytes of a medium outlive their last use")
    media_cache_bytes: int = Field(256 << 20, ge=0, description="memory for bytes of media kept in this process")
    max_media_bytes: int = Field(
        128 << 20,
        ge=1,
        description="largest medium; what a picture or a video may have is for the vision service to say",
    )
    max_media_per_request: int = Field(64, ge=0, description="most media in one dialogue")
    max_parallel_encodes: int = Field(8, ge=1, description="most media of one turn that are encoded at once")
    encode_patience_s: float = Field(
        10.0, ge=0, description="seconds that a turn's media wait for a vision service that is full of others' media"
    )
    max_messages: int = Field(1000, ge=1, description="most messages in one dialogue")
    max_parts_per_message: int = Field(512, ge=1, description="most parts in one message")
    max_text_chars: int = Field(1_000_000, ge=1, description="most characters of text in one dialogue")
    max_tools: int = Field(128, ge=0, description="most tools offered in one request")
    max_batch_items: int = Field(1000, ge=1, description="most items of one batch")
    max_batch_bytes: int = Field(4 << 20, ge=1, description="most bytes of one batch's items, media apart")
    max_batch_concurrency: int = Field(8, ge=1, description="most items of batches that this gateway asks at once")
    max_running_batches: int = Field(64, ge=1, description="most batches that this gateway works on")
    batch_ttl_s: int = Field(86_400, ge=1, description="seconds that a batch outlives its last result")
    batch_lease_s: float = Field(
        15.0, gt=0, description="seconds after which another gateway may take over a batch whose gateway has died"
    )

    @property
    def limits(self) -> Limits:
        """What one request may ask for."""
        return Limits(
            messages=self.max_messages,
            parts_per_message=self.max_parts_per_message,
            text_chars=self.max_text_chars,
            media=self.max_media_per_request,
            media_bytes=self.max_media_bytes,
            tools=self.max_tools,
        )

    @property
    def batch_limits(self) -> BatchLimits:
        """What batches may ask for."""
        return BatchLimits(
            items=self.max_batch_items,
            item_bytes=self.max_batch_bytes,
            concurrency=self.max_batch_concurrency,
            running=self.max_running_batches,
            ttl_s=self.batch_ttl_s,
        )
