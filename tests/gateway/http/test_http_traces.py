"""A request by HTTP is the beginning of a trace, or goes on with its caller's."""

from opentelemetry.trace import SpanKind

from tests.gateway.fakes_gateway import gateway_without_redis
from tests.gateway.http.edge import CHAT, edge_over
from tests.traces import CALLER, TRACE_ID, trace_id, traced


async def test_a_request_goes_on_with_its_caller_s_trace() -> None:
    with traced() as spans:
        async with edge_over(gateway_without_redis()) as edge:
            body = {"messages": [{"role": "user", "content": "canary"}]}
            response = await edge.client.post(CHAT, json=body, headers={"traceparent": CALLER})
            await edge.settled()
    (span,) = spans.all
    assert (span.kind, trace_id(span)) == (SpanKind.SERVER, TRACE_ID)
    told = dict(span.attributes or {})
    assert (told["http.request.method"], told["http.response.status_code"]) == ("POST", response.status_code)
    assert "canary" not in span.to_json()
