"""Turns the messages about media without a question into the client's types, and back."""

from __future__ import annotations

from collections.abc import Iterable

from internvl_client import batch_convert, convert
from internvl_client.content import Image, Media
from internvl_client.types import Estimate, Prefetched
from internvl_serving.gateway.v1 import media_service_pb2


def prefetch_request(media: Iterable[tuple[Media, bytes | None]]) -> media_service_pb2.PrefetchRequest:
    """Return the request for embeddings of media, each with the bytes that it brings, if any."""
    return media_service_pb2.PrefetchRequest(
        media=[convert.media_message(medium, content) for medium, content in media]
    )


def prefetched_of(response: media_service_pb2.PrefetchResponse, request_id: str) -> Prefetched:
    """Return what became of a medium."""
    if response.WhichOneof("outcome") == "error":
        return batch_convert.error_of(response.error, request_id)
    return convert.receipt_of(response.receipt)


def estimate_request(picture: Image, content: bytes | None) -> media_service_pb2.EstimateRequest:
    """Return the request for an estimate from `content`, or else from what the server holds of the digest."""
    return media_service_pb2.EstimateRequest(media=convert.media_message(picture, content))


def estimate_of(response: media_service_pb2.EstimateResponse) -> Estimate:
    """Return what a picture will take."""
    return Estimate(
        width=response.width,
        height=response.height,
        columns=response.columns,
        rows=response.rows,
        num_tiles=response.tile_count,
        num_tokens=response.token_count,
    )
