"""Settings that every service has, and the one place that reads the environment and the command line."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, Self, TypeVar
from urllib.parse import SplitResult, parse_qsl, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, ValidationInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.tls_files import TlsFiles

T = TypeVar("T")
SECRETS_DIR: Final = "INTERNVL_SECRETS_DIR"
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def _checked_address(text: str) -> str:
    host, separator, port = text.rpartition(":")
    if not (host and separator and port.isdecimal() and int(port) < 1 << 16):
        raise ValueError("has to be host:port, with a port of 0 to 65535")
    return text


def _checked_optional_address(text: str) -> str:
    return _checked_address(text) if text else text


Address = Annotated[str, AfterValidator(_checked_address)]
OptionalAddress = Annotated[str, AfterValidator(_checked_optional_address)]
OptionalFile = Annotated[Path | None, BeforeValidator(lambda path: path or None)]  # an empty variable is none


def _only_with(name: str) -> AfterValidator:
    """Return the check of what means nothing without the file of field `name`."""

    def check(value: T, info: ValidationInfo) -> T:
        if value and not info.data.get(name):
            raise ValueError(f"needs --{name.replace('_', '-')}")
        return value

    return AfterValidator(check)


def _just_with(name: str) -> AfterValidator:
    """Return the check of a file that is given where the one of field `name` is, and nowhere else."""

    def check(file: Path | None, info: ValidationInfo) -> Path | None:
        if bool(file) != bool(info.data.get(name)):
            raise ValueError(f"goes with --{name.replace('_', '-')}: give both or neither")
        return file

    return AfterValidator(check)


# What a Redis URL may set beside address, user and database; the rest would undo settings of ours.
_REDIS_OPTIONS: Final = {
    "redis": {"db"},
    "rediss": {"db", "ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname", "ssl_keyfile"},
    "unix": {"db", "username", "password"},
}
_ESCAPE = "; in user and password, what is special in a URL has to be percent-encoded"


def _checked_redis_url(url: SecretStr) -> SecretStr:
    """Return a URL that a client can be made from, or raise `ValueError`, which never quotes it."""
    try:
        parts = urlsplit(url.get_secret_value())
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError(f"has no host and port that can be read{_ESCAPE}") from None
    if parts.scheme not in _REDIS_OPTIONS:
        raise ValueError("has to begin with redis://, rediss:// or unix://")
    if parts.fragment or (parts.scheme != "unix" and not host):
        raise ValueError(f"has no host, or something behind the database{_ESCAPE}")
    if parts.scheme == "unix" and not parts.path:
        raise ValueError("has no path of a socket")
    if port == 0:
        raise ValueError("has a port that is not 1 to 65535")
    _check_redis_options(parts)
    return url


def _check_redis_options(parts: SplitResult) -> None:
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    allowed = _REDIS_OPTIONS[parts.scheme]
    if unknown := sorted(options.keys() - allowed):
        raise ValueError(f"may set {', '.join(sorted(allowed))}, but not {', '.join(unknown)}")
    in_path = "" if parts.scheme == "unix" else parts.path.removeprefix("/")
    for database in (in_path or "0", options.get("db", "0")):
        if not database.isdecimal():
            raise ValueError(f"has a database that is not a number{_ESCAPE}")


def _checked_optional_redis_url(url: SecretStr) -> SecretStr:
    return _checked_redis_url(url) if url else url


RedisUrl = Annotated[SecretStr, AfterValidator(_checked_redis_url)]
OptionalRedisUrl = Annotated[SecretStr, AfterValidator(_checked_optional_redis_url)]  # empty, and then false: none


# On both classes, because mixing them lets the last one's values win, pydantic-settings' own defaults included.
_CONFIG = SettingsConfigDict(
    frozen=True, extra="forbid", hide_input_in_errors=True, cli_kebab_case=True, cli_implicit_flags=True
)


class CommandLineSettings(BaseSettings):
    """Settings of a program. Frozen; read once at start."""

    model_config = _CONFIG

    @classmethod
    def from_command_line(cls, program: str, arguments: Sequence[str] | None = None) -> Self:
        """Return the settings from flags, environment, files and defaults; exit with 2 and a line per mistake.

        A file in the directory that `INTERNVL_SECRETS_DIR` names sets what the variable of its name would (lower case).
        """
        try:
            flags = list(sys.argv[1:] if arguments is None else arguments)
            secrets_dir = os.environ.get(SECRETS_DIR) or None
            return cls(_cli_parse_args=flags, _cli_prog_name=program, _secrets_dir=secrets_dir)  # type: ignore[call-arg]  # pydantic's own
        except ValidationError as error:
            prefix = cls.model_config.get("env_prefix", "")
            for problem in error.errors(include_input=False, include_url=False):
                name = ".".join(map(str, problem["loc"]))
                flag = name.replace("_", "-")
                print(f"{program}: --{flag} (or {prefix}{name.upper()}): {problem['msg']}", file=sys.stderr)  # noqa: T201
            raise SystemExit(2) from None
        except argparse.ArgumentError as error:
            print(f"{program}: {error}", file=sys.stderr)  # noqa: T201
            raise SystemExit(2) from None


class ServiceSettings(CommandLineSettings):
    """Where a service listens, how it logs, how it stops."""

    listen: Address = Field("127.0.0.1:0", description="host:port to listen on; port 0 takes a free one")
    advertise: str = Field(
        "", description="host:port that others reach this replica under; empty: as bound. Needed where that is 0.0.0.0"
    )
    address_file: Path | None = Field(None, description="file to write the bound host:port to")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe event to log")
    log_format: Literal["auto", "json", "console"] = Field("auto", description="auto: console on a terminal, else json")
    metrics_listen: OptionalAddress = Field(
        "",
        description="host:port to answer GET /metrics on, to whoever reaches it; port 0 takes a free one; empty: none",
    )
    metrics_address_file: Path | None = Field(None, description="file to write the host:port of the metrics to")
    health_listen: OptionalAddress = Field(
        "",
        description="host:port to answer grpc.health.v1 on, in plaintext and nothing else; port 0 takes a free one; "
        "empty: only where calls are answered",
    )
    health_address_file: Path | None = Field(None, description="file to write the host:port of the health checks to")
    tls_cert_file: OptionalFile = Field(
        None, description="PEM file of this service's certificate and what leads up to its authority; none: plaintext"
    )
    tls_key_file: Annotated[OptionalFile, _just_with("tls_cert_file")] = Field(
        None, validate_default=True, description="PEM file of that certificate's key, not encrypted"
    )
    tls_client_ca_file: Annotated[OptionalFile, _only_with("tls_cert_file")] = Field(
        None, description="PEM file of who may have signed callers' certificates; none: callers need none"
    )
    part_stall_s: float = Field(
        120.0,
        gt=0,
        description="seconds that a part, such as a model, may have work without taking a step; after half of them the "
        "service is not ready, after all of them not alive",
    )
    trace_endpoint: str = Field(
        "", description="http:// or https:// address of an OTLP collector (gRPC) that traces are sent to; empty: none"
    )
    trace_sample_ratio: float = Field(
        1.0, ge=0, le=1, description="share of the traces that begin here which are kept; callers decide about theirs"
    )
    drain_grace_s: float = Field(30.0, ge=0, description="seconds that running calls get after SIGTERM")
    client_stall_s: float = Field(
        30.0, gt=0, description="seconds after which a stream ends of which its client reads nothing more"
    )
    max_message_bytes: int = Field(8 << 20, ge=1 << 20, description="largest gRPC message, either way")

    @property
    def server_tls(self) -> TlsFiles | None:
        """What callers are answered with; None: plaintext."""
        if not self.tls_cert_file:
            return None
        return TlsFiles(self.tls_client_ca_file, self.tls_cert_file, self.tls_key_file)


class StageTlsSettings(BaseSettings):
    """How the vision and the LLM services are reached. Mixed into the settings of the services that call them."""

    model_config = _CONFIG

    stage_ca_file: OptionalFile = Field(
        None, description="PEM file of who signed the certificates of the stages that are called; none: plaintext"
    )
    stage_cert_file: Annotated[OptionalFile, _only_with("stage_ca_file")] = Field(
        None, description="PEM file of the certificate that is shown to stages; none: they ask for none"
    )
    stage_key_file: Annotated[OptionalFile, _just_with("stage_cert_file")] = Field(
        None, validate_default=True, description="PEM file of that certificate's key, not encrypted"
    )
    stage_name: Annotated[str, _only_with("stage_ca_file")] = Field(
        "", description="name that the certificates of all stages bear; empty: the host that is called"
    )

    @property
    def stage_tls(self) -> TlsFiles | None:
        """What stages are called with; None: plaintext."""
        if not self.stage_ca_file:
            return None
        return TlsFiles(self.stage_ca_file, self.stage_cert_file, self.stage_key_file, self.stage_name)


class EmbeddingStoreSettings(BaseSettings):
    """Where embeddings are kept. Mixed into the settings of the vision and the LLM service."""

    model_config = _CONFIG

    redis_url: OptionalRedisUrl = Field(
        SecretStr(""), description="redis:// URL of the embedding store; empty, as it is by default: none"
    )
    redis_timeout_s: float = Field(0.25, gt=0, description="longest wait for one answer of the embedding store")
    embedding_ttl_s: int = Field(86_400, ge=1, description="seconds that an embedding stays in the store")
    embedding_key: SecretStr = Field(
        SecretStr(""), description="secret that authenticates stored embeddings; the same for vision and LLM services"
    )
    embedding_write_items: int = Field(
        256, ge=1, description="embeddings that may wait to be written to the store; more are not kept there"
    )
    embedding_write_bytes: int = Field(256 << 20, ge=1, description="bytes of embeddings that may wait to be written")
    local_cache_bytes: int = Field(512 << 20, ge=0, description="memory for embeddings kept in this process")
