"""The gateway's HTTP edge: OpenAI's API, health, metrics, pages."""

from gateway.http.app import Bounds, Parts, http_edge, make_app
from gateway.http.server import HttpOptions, answering

__all__ = ["Bounds", "HttpOptions", "Parts", "answering", "http_edge", "make_app"]
