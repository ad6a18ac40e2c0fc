"""Fetches media from URLs, for servers whose operator allows it: https only, from named hosts, at public addresses."""

from gateway.remote.fetch_metrics import FetchMetrics
from gateway.remote.hosts import HostList
from gateway.remote.limits import FetchLimits
from gateway.remote.media import RemoteMedia, opened_remote_media

__all__ = ["FetchLimits", "FetchMetrics", "HostList", "RemoteMedia", "opened_remote_media"]
