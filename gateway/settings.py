"""The gateway's settings."""

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from gateway.dialogue import Limits
from shared.settings import RedisUrl, ServiceSettings

_REDIS_URL = "redis://127.0.0.1:6379/0"


class GatewaySettings(ServiceSettings):
    """Where the stages and the store are, and how much one request may ask for."""

    model_config = SettingsConfigDict(env_prefix="GATEWAY_")

    vision_target: str = Field(description="gRPC target of the vision service: host:port, or dns:///name:port")
    llm_target: str = Field(description="gRPC target of the LLM service: host:port, or dns:///name:port")
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
    max_media_bytes: int = Field(32 << 20, ge=1, description="largest medium")
    max_media_per_request: int = Field(64, ge=0, description="most media in one dialogue")
    max_parallel_encodes: int = Field(8, ge=1, description="most media of one turn that are encoded at once")
    max_messages: int = Field(1000, ge=1, description="most messages in one dialogue")
    max_parts_per_message: int = Field(512, ge=1, description="most parts in one message")
    max_text_chars: int = Field(1_000_000, ge=1, description="most characters of text in one dialogue")

    @property
    def limits(self) -> Limits:
        """What one request may ask for."""
        return Limits(
            messages=self.max_messages,
            parts_per_message=self.max_parts_per_message,
            text_chars=self.max_text_chars,
            media=self.max_media_per_request,
            media_bytes=self.max_media_bytes,
        )
