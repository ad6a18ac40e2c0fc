"""The gateway's settings."""

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Final

from pydantic import AfterValidator, Field, SecretStr, ValidationInfo
from pydantic_settings import SettingsConfigDict

from gateway.admission import AdmissionLimits
from gateway.batches import BatchLimits
from gateway.dialogue import Limits
from gateway.keys_file import read_keys_file
from gateway.remote import FetchLimits, HostList
from gateway.routing import RoutingPolicy, Targets
from shared.settings import OptionalAddress, OptionalRedisUrl, RedisUrl, ServiceSettings, StageTlsSettings

_REDIS_URL = "redis://127.0.0.1:6379/0"
_LISTENING: Final = ("listen", "http_listen")  # settings that open the API to whoever reaches an address


def _readable_target(target: str) -> str:
    if target:
        Targets(target)
    return target


StageTarget = Annotated[str, AfterValidator(_readable_target)]


def _both_or_neither(target: str, info: ValidationInfo) -> str:
    if bool(target) != bool(info.data.get("critic_vision_target")):
        raise ValueError("a critic has a vision and an LLM service: give both targets or neither")
    return target


def _usable_keys_file(path: Path | None) -> Path | None:
    if path is not None:
        read_keys_file(path)
    return path


def _guarded(allow_anyone: bool, info: ValidationInfo) -> bool:
    if "keys_file" not in info.data:
        return allow_anyone  # it was given and cannot be used; that is said already
    if info.data["keys_file"] is not None:
        if allow_anyone:
            raise ValueError("with a keys file only those with a key may call: give one of the two")
        return allow_anyone
    exposed = [address for name in _LISTENING if (address := info.data.get(name)) and not _is_loopback(address)]
    if exposed and not allow_anyone:
        raise ValueError(
            f"{exposed[0]} can be reached from other machines, and without --keys-file whoever reaches it may use it: "
            "give --keys-file (see docs/keys.md), or --allow-anyone if that is meant"
        )
    return allow_anyone


def _listed_hosts(text: str) -> str:
    HostList.parsed(text)
    return text


def _any_host_on_purpose(is_meant: bool, info: ValidationInfo) -> bool:
    if "remote_media_hosts" in info.data and HostList.parsed(info.data["remote_media_hosts"]).allows_any != is_meant:
        raise ValueError("fetching from any host takes both: --remote-media-hosts '*' and --remote-media-any-host")
    return is_meant


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class GatewaySettings(ServiceSettings, StageTlsSettings):
    """Where the stages and the store are, and how much one request may ask for."""

    model_config = SettingsConfigDict(env_prefix="GATEWAY_")

    vision_target: StageTarget = Field(
        description="replicas of the vision service: host:port, or dns:///name:port for all of a name, joined by commas"
    )
    llm_target: StageTarget = Field(description="replicas of the LLM service, in the same way")
    critic_vision_target: StageTarget = Field(
        "", description="replicas of the critic's vision service; empty: no critic"
    )
    critic_llm_target: Annotated[StageTarget, AfterValidator(_both_or_neither)] = Field(
        "", validate_default=True, description="replicas of the critic's LLM service; empty: no critic"
    )
    replica_load_factor: float = Field(
        1.5, ge=1, description="times the mean of calls that a replica may have before others are asked in its place"
    )
    replica_ejection_s: float = Field(
        1.0,
        gt=0,
        description="seconds that a replica is left alone after a failure; after each further one, twice that",
    )
    replica_stall_s: float = Field(
        2.0, gt=0, description="seconds without any sign of an answer after which an LLM replica gets no more turns"
    )
    replica_patience_s: float = Field(
        1.0, ge=0, description="seconds that a call waits for a replica where none serves"
    )
    redis_url: RedisUrl = Field(
        SecretStr(_REDIS_URL),
        description="redis:// URL of the store of conversations and media; it must not evict. Without it chats that "
        f"carry everything themselves still work. If not given: {_REDIS_URL}",
    )
    media_redis_url: OptionalRedisUrl = Field(
        SecretStr(""),
        description="redis:// URL of a store for the bytes of media alone, which may evict: clients then upload again "
        "what is missing. If not given: the store of conversations",
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
    max_running_turns: int = Field(256, ge=1, description="most turns that this gateway works on at once")
    max_waiting_turns: int = Field(
        1024, ge=0, description="most turns that wait until they may run; more are refused with QUEUE_FULL"
    )
    max_waiting_bytes: int = Field(256 << 20, ge=0, description="most bytes of media that waiting turns bring along")
    max_wait_s: float = Field(
        30.0, ge=0, description="longest that a turn waits; one that would wait longer is refused at once"
    )
    max_batch_items: int = Field(1000, ge=1, description="most items of one batch")
    max_batch_bytes: int = Field(4 << 20, ge=1, description="most bytes of one batch's items, media apart")
    max_batch_concurrency: int = Field(
        8,
        ge=1,
        description="most items of batches that this gateway asks at once: of all tenants, who share that fairly",
    )
    max_running_batches: int = Field(64, ge=1, description="most batches that this gateway works on")
    batch_ttl_s: int = Field(86_400, ge=1, description="seconds that a batch outlives its last result")
    batch_lease_s: float = Field(
        15.0, gt=0, description="seconds after which another gateway may take over a batch whose gateway has died"
    )
    http_listen: OptionalAddress = Field(
        "", description="host:port to answer HTTP on: OpenAI's API and the page; port 0 takes a free one; empty: none"
    )
    http_port_fallback: bool = Field(
        False, description="take a free port of that host where the port of http_listen is taken, and do not fail"
    )
    http_address_file: Path | None = Field(None, description="file to write the host:port of HTTP to")
    http_max_connections: int = Field(4096, ge=1, description="most HTTP connections, idle ones included")
    http_max_body_bytes: int = Field(64 << 20, ge=1, description="largest body of an HTTP request")
    http_max_total_body_bytes: int = Field(
        512 << 20, ge=1, description="most bytes of HTTP bodies held at once; what would be more gets a 429"
    )
    keys_file: Annotated[Path | None, AfterValidator(_usable_keys_file)] = Field(
        None, description="JSON file of tenants and the hashes of their API keys; none: nobody has to show a key"
    )
    keys_poll_s: float = Field(2.0, gt=0, description="seconds between two looks at that file, which may change")
    # Last of all: it is checked against what was said before.
    allow_anyone: Annotated[bool, AfterValidator(_guarded)] = Field(
        False, validate_default=True, description="without a keys file, listen where other machines reach this one"
    )

    remote_media_hosts: Annotated[str, AfterValidator(_listed_hosts)] = Field(
        "",
        description="hosts that media may be fetched from over https, with commas between them: host, host:port or "
        "*.domain; empty: no URL is fetched",
    )
    remote_media_any_host: Annotated[bool, AfterValidator(_any_host_on_purpose)] = Field(
        False, validate_default=True, description="whether remote_media_hosts may be *, which is every public host"
    )
    remote_media_max_bytes: int = Field(32 << 20, ge=1, description="largest medium that is fetched from a URL")
    remote_media_timeout_s: float = Field(20.0, gt=0, description="longest that one fetch of a URL may take")
    max_parallel_fetches: int = Field(8, ge=1, description="most URLs that this gateway fetches at once")

    @property
    def remote_hosts(self) -> HostList:
        """Where media may be fetched from."""
        return HostList.parsed(self.remote_media_hosts)

    @property
    def fetch_limits(self) -> FetchLimits:
        """What fetches of media may take."""
        return FetchLimits(
            max_bytes=min(self.remote_media_max_bytes, self.max_media_bytes),
            timeout_s=self.remote_media_timeout_s,
            parallel=self.max_parallel_fetches,
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
    def routing(self) -> RoutingPolicy:
        """What is asked of replicas."""
        return RoutingPolicy(
            load_factor=self.replica_load_factor,
            ejection_s=self.replica_ejection_s,
            stall_s=self.replica_stall_s,
            patience_s=self.replica_patience_s,
        )

    @property
    def admission_limits(self) -> AdmissionLimits:
        """How many turns run and wait."""
        return AdmissionLimits(
            running=self.max_running_turns,
            waiting=self.max_waiting_turns,
            wait_s=self.max_wait_s,
            waiting_bytes=self.max_waiting_bytes,
            background=self.max_batch_concurrency,
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
