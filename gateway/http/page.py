"""The page at `/`: one document with its script and style, from this package's files and from nowhere else."""

import gzip
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Final, Self

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

# The model's words, and those of whoever wrote on a picture, end up in this page: nothing that is not a file of ours
# may run in it, it talks to no other server, and no other page may frame it.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; media-src 'self' blob: data:; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)
_HEADERS: Final = {
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "geolocation=(), microphone=(), payment=(), usb=()",
    "referrer-policy": "no-referrer",
    "vary": "accept-encoding",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cache-control": "no-cache",  # asked about each time, by its tag: a new version is seen at once
}
_TYPES: Final = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_NAMES: Final = (
    "index.html",
    "page.css",
    "page.js",
    "answer.js",
    "dialogue.js",
    "elements.js",
    "grounding.js",
    "media.js",
    "picture.js",
    "icon.svg",
)


def _path(name: str) -> str:
    return "/" if name == "index.html" else f"/page/{name}"


PAGE_PATHS: Final = tuple(_path(name) for name in _NAMES)


def page_routes() -> list[BaseRoute]:
    """Return the routes of the page, at `PAGE_PATHS`; anybody may read them, there is nothing of anyone's in them."""
    return [Route(_path(name), _endpoint(_File.read(name)), methods=["GET"]) for name in _NAMES]


@dataclass(frozen=True, slots=True)
class _File:
    """A file of the page, in memory, as it is and compressed."""

    content: bytes
    compressed: bytes
    media_type: str
    tag: str

    @classmethod
    def read(cls, name: str) -> Self:
        content = files("gateway.http").joinpath("static", name).read_bytes()
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        return cls(content, gzip.compress(content, mtime=0), _TYPES[name.rpartition(".")[2]], tag)

    def response_to(self, request: Request) -> Response:
        headers = {**_HEADERS, "etag": self.tag}
        if request.headers.get("if-none-match") == self.tag:
            return Response(status_code=304, headers=headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers["content-encoding"] = "gzip"
            return Response(self.compressed, headers=headers, media_type=self.media_type)
        return Response(self.content, headers=headers, media_type=self.media_type)


def _endpoint(file: _File) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return file.response_to(request)

    return answer
