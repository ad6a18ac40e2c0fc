"""How the client reaches a gateway: channel options, metadata and deadlines, the same for both clients."""

import json
import re
import time
import uuid
from collections.abc import Sequence
from typing import Final, TypedDict

from grpc.experimental import ChannelOptions

MAX_MESSAGE_BYTES: Final = 8 << 20
SHORT_CALL_S: Final = 60.0  # for calls that are answered at once, or not at all
REQUEST_ID_KEY: Final = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

# Retries happen only before the server has begun to answer: nothing is ever said twice.
SERVICE_CONFIG: Final = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "1s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
        "retryThrottling": {"maxTokens": 20, "tokenRatio": 0.1},
    }
)

# All three ping settings are needed: without the ping timeout a frozen server is noticed only after a minute.
CHANNEL_OPTIONS: Final[tuple[tuple[str, str | int], ...]] = (
    ("grpc.service_config", SERVICE_CONFIG),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # what making a connection may take, whatever its name says
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

# Streams are read by the thread that iterates them. By default another thread reads all streams of a channel, and a
# Ctrl-C at a bad moment of the iterating one ends it (grpcio 1.85): every later call would wait for ever.
BLOCKING_OPTIONS: Final = ((ChannelOptions.SingleThreadedUnaryStream, 1),)


class CallOptions(TypedDict):
    """Keyword arguments of a stub's method."""

    timeout: float | None
    metadata: tuple[tuple[str, str | bytes], ...]


class CallScope:
    """What the calls made for one request share: its id, its metadata and the time that is left for it."""

    def __init__(self, request_id: str | None, timeout_s: float | None, metadata: Sequence[tuple[str, str]]) -> None:
        """Draw an id when none is given; raise `ValueError` for one that servers would not take."""
        self.request_id = request_id or uuid.uuid4().hex
        if not _REQUEST_ID.fullmatch(self.request_id):
            raise ValueError("A request id is 1 to 128 letters, digits or the characters ._:-")
        self._metadata: tuple[tuple[str, str | bytes], ...] = (*metadata, (REQUEST_ID_KEY, self.request_id))
        self._expires_at = None if timeout_s is None else time.monotonic() + timeout_s

    def options(self, default_s: float | None = None) -> CallOptions:
        """Return timeout and metadata for the next call; `default_s` is its time where nobody has set one."""
        remaining = default_s if self._expires_at is None else max(0.0, self._expires_at - time.monotonic())
        return CallOptions(timeout=remaining, metadata=self._metadata)
