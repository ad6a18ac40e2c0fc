"""What the stages tell a trace of one call: the parts of its work, under the span that their caller began."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.trace import SpanKind
from PIL import Image

from internvl_serving.vision.v1.vision_service_pb2 import EncodeHeader, EncodeRequest
from shared.digest import digest_of
from tests.rpc import llm_calls
from tests.rpc.vision_replica import replica
from tests.traces import CALLER, TRACE_ID, Spans, id_of, parent_of, trace_id, traced

METADATA = (("traceparent", CALLER),)


@pytest.fixture
def spans() -> Iterator[Spans]:
    with traced() as kept:
        yield kept


def parts_of(spans: Spans, call: str) -> dict[str, dict[str, Any]]:
    """Return what was recorded under the one call that the caller's trace has, by name; all of it must lie within."""
    (served,) = [span for span in spans.all if span.name.endswith(call) and trace_id(span) == TRACE_ID]
    assert served.kind is SpanKind.SERVER
    parts = [span for span in spans.all if parent_of(span) == id_of(served)]
    for part in parts:
        assert part.start_time is not None
        assert served.start_time is not None
        assert served.start_time - 2_000_000 <= part.start_time
    return {part.name: dict(part.attributes or {}) for part in parts}


async def test_an_encode_tells_what_it_did(spans: Spans, tmp_path: Path, redis_url: str) -> None:
    buffer = BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, "PNG")
    header = EncodeHeader(media_digest=digest_of(buffer.getvalue()))
    async with replica(tmp_path, redis_url=redis_url) as vision:
        messages = [EncodeRequest(header=header), EncodeRequest(chunk=buffer.getvalue())]
        await vision.stub.Encode(iter(messages), metadata=METADATA)
    parts = parts_of(spans, "VisionService/Encode")
    assert {"preprocess", "queue", "encode", "redis get"} <= parts.keys()
    assert parts["encode"]["internvl.tiles"] == 13
    assert parts["redis get"]["db.system.name"] == "redis"
    (call,) = [span for span in spans.all if span.name.endswith("Encode")]
    assert dict(call.attributes or {})["internvl.cache_tier"] == "none"


async def test_an_answer_tells_what_it_did(spans: Spans, tmp_path: Path) -> None:
    async with llm_calls.running(tmp_path) as stub, llm_calls.vision() as (servicer, address):
        servicer.held.add("ab" * 32)
        asked = llm_calls.request(llm_calls.picture_prompt(llm_calls.handle(address)))
        events = [event async for event in stub.Generate(asked, metadata=METADATA)]
    parts = parts_of(spans, "LlmService/Generate")
    assert {"queue", "prefill", "decode", "fetch embedding"} <= parts.keys()
    usage, (transfer,) = events[-1].finished.usage, events[-1].finished.transfers
    assert parts["decode"]["gen_ai.usage.output_tokens"] == usage.output_token_count
    fetched = parts["fetch embedding"]
    assert (fetched["internvl.cache_tier"], fetched["internvl.bytes"]) == ("vision", transfer.size_bytes)
    assert transfer.size_bytes == llm_calls.TOKENS_PER_TILE * llm_calls.HIDDEN * 4
    (call,) = [span for span in spans.all if span.name.endswith("VisionService/FetchEmbedding")]
    assert (call.kind, trace_id(call)) == (SpanKind.CLIENT, TRACE_ID)
