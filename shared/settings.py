"""Settings that every service has, and the one place that reads the environment and the command line."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def _checked_address(text: str) -> str:
    host, separator, port = text.rpartition(":")
    if not (host and separator and port.isdecimal() and int(port) < 1 << 16):
        raise ValueError("has to be host:port, with a port of 0 to 65535")
    return text


Address = Annotated[str, AfterValidator(_checked_address)]


# On both classes, because mixing them lets the last one's values win, pydantic-settings' own defaults included.
_CONFIG = SettingsConfigDict(frozen=True, extra="forbid", cli_kebab_case=True, cli_implicit_flags=True)


class ServiceSettings(BaseSettings):
    """Where a service listens, how it logs, how it stops. Frozen; read once at start."""

    model_config = _CONFIG

    listen: Address = Field("127.0.0.1:0", description="host:port to listen on; port 0 takes a free one")
    advertise: str = Field(
        "", description="host:port that others reach this replica under; empty: as bound. Needed where that is 0.0.0.0"
    )
    address_file: Path | None = Field(None, description="file to write the bound host:port to")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe event to log")
    log_format: Literal["auto", "json", "console"] = Field("auto", description="auto: console on a terminal, else json")
    drain_grace_s: float = Field(30.0, ge=0, description="seconds that running calls get after SIGTERM")
    max_message_bytes: int = Field(8 << 20, ge=1 << 20, description="largest gRPC message, either way")

    @classmethod
    def from_command_line(cls, program: str, arguments: Sequence[str] | None = None) -> Self:
        """Return the settings from flags, environment and defaults; exit with 2 and a line per mistake."""
        try:
            flags = list(sys.argv[1:] if arguments is None else arguments)
            return cls(_cli_parse_args=flags, _cli_prog_name=program)  # type: ignore[call-arg]  # pydantic's own
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


class EmbeddingStoreSettings(BaseSettings):
    """Where embeddings are kept. Mixed into the settings of the vision and the LLM service."""

    model_config = _CONFIG

    redis_url: str = Field(
        "", pattern="^$|^(redis|rediss|unix)://", description="redis:// URL of the embedding store; empty: none"
    )
    redis_timeout_s: float = Field(0.25, gt=0, description="longest wait for one answer of the embedding store")
    embedding_ttl_s: int = Field(86_400, ge=1, description="seconds that an embedding stays in the store")
    embedding_key: SecretStr = Field(
        SecretStr(""), description="secret that authenticates stored embeddings; the same for vision and LLM services"
    )
    local_cache_bytes: int = Field(512 << 20, ge=0, description="memory for embeddings kept in this process")
