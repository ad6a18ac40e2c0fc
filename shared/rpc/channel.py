"""Opens channels between services, with the keepalive, back-off and retry settings that measurements asked for."""

from pathlib import Path
from typing import Final

import grpc

SERVICE_CONFIG: Final = Path(__file__).with_name("service_config.json").read_text(encoding="utf-8")
KEEPALIVE_MS: Final = 10_000


def open_channel(target: str, max_message_bytes: int) -> grpc.aio.Channel:
    """Return a channel to `target` (`host:port`, or `dns:///name:port` for all replicas behind a name)."""
    return grpc.aio.insecure_channel(target, options=channel_options(max_message_bytes))


def channel_options(max_message_bytes: int) -> list[tuple[str, str | int]]:
    """Return the options of every channel.

    All three keepalive settings are needed: without the ping timeout a frozen peer is noticed only after the 60 s that
    a bandwidth probe in flight may take.
    """
    return [
        ("grpc.service_config", SERVICE_CONFIG),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.ping_timeout_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
    ]
