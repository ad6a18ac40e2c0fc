"""Opens ports: with the options of every server, in plaintext or with TLS, and says where."""

from pathlib import Path

import grpc

from shared.rpc.channel import KEEPALIVE_MS
from shared.rpc.tls import server_credentials
from shared.tls_files import TlsFiles


def server_options(max_message_bytes: int) -> list[tuple[str, str | int]]:
    """Return the options of every server.

    `so_reuseport` off: two servers must never share a port silently. The pending limits: grpcio cancels calls at random
    when more than about a thousand wait to be accepted.
    """
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.server.max_pending_requests", 10_000),
        ("grpc.server.max_pending_requests_hard_limit", 20_000),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.ping_timeout_ms", 5_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def bind(server: grpc.aio.Server, listen: str, setting: str, tls: TlsFiles | None = None) -> str:
    """Have a server listen; return the host:port that it took. Without `tls` it speaks plaintext.

    Raises `OSError` where the address, which `setting` gave, is taken, and `TlsError`.
    """
    credentials = server_credentials(tls) if tls else None
    host, _, _ = listen.rpartition(":")
    try:
        port = server.add_secure_port(listen, credentials) if credentials else server.add_insecure_port(listen)
    except RuntimeError:
        raise OSError(f"cannot listen on {listen}: is the port taken? Choose another with {setting}.") from None
    return f"{host}:{port}"


def write_address(file: Path | None, address: str) -> None:
    """Write an address to a file, if there is one, so that a reader never sees half of it."""
    if file:
        partial = file.with_name(f"{file.name}.partial")
        partial.write_text(address)
        partial.replace(file)
