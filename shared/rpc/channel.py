"""Opens channels between services, with the keepalive, back-off and retry settings that measurements asked for."""

from pathlib import Path
from typing import Final

import grpc

from shared.rpc.renewed_channel import RenewedChannel
from shared.rpc.tls import channel_credentials
from shared.tls_files import TlsContent, WatchedTls

SERVICE_CONFIG: Final = Path(__file__).with_name("service_config.json").read_text(encoding="utf-8")
KEEPALIVE_MS: Final = 10_000


def open_channel(
    target: str, max_message_bytes: int, tls: WatchedTls | None = None, *, name: str = "", retries: bool = True
) -> grpc.aio.Channel:
    """Return a channel to `target` (`host:port`, or `dns:///name:port` for all replicas behind a name).

    With `tls` it is encrypted, and whom it reaches has to prove to be `name`, unless the files name another (empty: the
    host of `target`); files that are replaced are taken up. Without, it is plaintext. `retries` off: whoever calls asks
    another replica instead.
    """
    options = channel_options(max_message_bytes)
    if not retries:
        options.append(("grpc.enable_retries", 0))
    if tls is None:
        return grpc.aio.insecure_channel(target, options=options)
    if expected := tls.files.peer_name or name:
        options.append(("grpc.ssl_target_name_override", expected))

    def open_one(content: TlsContent) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(target, channel_credentials(content), options=options)

    return RenewedChannel(tls, open_one)


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
        ("grpc.min_reconnect_backoff_ms", 5_000),  # what making a connection may take, whatever its name says
        ("grpc.max_reconnect_backoff_ms", 1_000),
    ]
