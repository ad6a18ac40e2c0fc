"""The edge itself: who is let in, what is drained and cut, who has left, what is too slow, what is told of itself."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog

from gateway.auth import KeyGate, presented_key
from gateway.caller import Caller, admit
from gateway.events import Delta, FinishReason, Generated
from gateway.http import Bounds, HttpOptions, answering
from shared.digest import digest_of
from shared.errors import ApiKeyInvalid
from tests.gateway.fakes_gateway import CAT, STARTED, Script, gateway_without_redis
from tests.gateway.http.edge import CHAT, MODELS, Edge, edge_over, error_of, events_of, words

OPEN = ("/health", "/health/live", "/health/ready")


def gate(path: str, headers: Iterable[tuple[str, str | bytes]]) -> None:
    if presented_key(headers) != "right":
        raise ApiKeyInvalid("A key is needed.")
    admit(Caller("tenant", "key"))


@pytest.fixture
async def guarded() -> AsyncIterator[Edge]:
    async with edge_over(gateway_without_redis(), gate=gate, needs_key=True) as edge:
        yield edge


async def raw(edge: Edge, request: bytes) -> bytes:
    """Send bytes and return the beginning of what comes back."""
    reader, writer = await asyncio.open_connection(*edge.host)
    writer.write(request)
    answer = await reader.read(1 << 16)
    writer.close()
    return answer


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


async def test_nothing_but_health_answers_without_a_key(guarded: Edge) -> None:
    described = (await guarded.client.get("/openapi.json", headers={"authorization": "Bearer right"})).json()
    paths = {*described["paths"], "/metrics", "/docs", "/openapi.json", "/nowhere", "/"}
    for path in paths:
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
            response = await guarded.client.request(method, re.sub(r"{.*}", "x", path))
            assert (response.status_code == 401) == (path not in OPEN), (method, path)
    assert error_of(await guarded.client.get(MODELS))[:2] == (401, "API_KEY_INVALID")
    assert (await guarded.client.get(MODELS)).headers["www-authenticate"] == "Bearer"


async def test_a_key_opens_and_no_key_is_like_a_wrong_one(guarded: Edge) -> None:
    for headers in ({"authorization": "Bearer right"}, {"Authorization": "bearer right"}, {"x-api-key": "right"}):
        assert (await guarded.client.get(MODELS, headers=headers)).status_code == 200
    wrong: tuple[dict[str, str], ...] = ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic right"})
    answers = [await guarded.client.get(MODELS, headers=headers) for headers in wrong]
    assert {answer.text for answer in answers} == {answers[0].text}
    assert {answer.status_code for answer in answers} == {401}


@pytest.mark.parametrize(
    "target",
    [
        b"//v1/models",
        b"/v1/../v1/models",
        b"/health/../v1/models",
        b"/health%2f..%2fv1/models",
        b"/%68ealth/../v1/models",
        b"/health/",
        b"/health;/v1/models",
        b"/V1/models",
        b"/v1/models?/health",
        b"/v1/models#/health",
        b"http://x/health/../v1/models",
        b"*",
    ],
)
@pytest.mark.parametrize("host", [b"x", b"x/health?", b"x/health#", b"/health", b"localhost:80/health/live?x="])
async def test_no_spelling_of_a_path_or_a_host_gets_around_the_key(guarded: Edge, target: bytes, host: bytes) -> None:
    request = b"GET " + target + b" HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n"
    assert status_of(await raw(guarded, request)) in (400, 401)
    assert guarded.facts.descriptions == 0


async def test_two_keys_are_none(guarded: Edge) -> None:
    request = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer right\r\nAuthorization: Bearer right\r\n"
    assert status_of(await raw(guarded, request + b"Connection: close\r\n\r\n")) == 401


async def test_the_request_id_comes_back_and_one_that_is_unfit_is_replaced() -> None:
    async with edge_over(gateway_without_redis()) as edge:
        for path in (MODELS, "/nowhere"):
            answer = await edge.client.get(path, headers={"x-request-id": "abc-1"})
            assert answer.headers["x-request-id"] == "abc-1"
        unfit = await edge.client.get(MODELS, headers={"x-request-id": "a b"})
        assert re.fullmatch(r"[0-9a-f]{32}", unfit.headers["x-request-id"])


async def test_every_request_is_logged_and_counted_once_by_a_name_of_ours() -> None:
    async with edge_over(gateway_without_redis()) as edge:
        with structlog.testing.capture_logs() as logged:
            await edge.chat("Hi")
            await edge.client.get("/secret-in-a-path")
            await edge.client.get("/health")
            await edge.settled()
        finished = [entry for entry in logged if entry["event"] == "call_finished"]
        assert [(entry["method"], entry["code"], entry["status"]) for entry in finished] == [
            ("Http/ChatCompletions", "OK", 200),
            ("Http/Other", "UNIMPLEMENTED", 404),
        ]
        assert "secret" not in str(logged)
        count = edge.registry.value("internvl_rpc_finished_total", rpc="Http/ChatCompletions", code="OK")
        started = edge.registry.value("internvl_rpc_started_total", rpc="Http/ChatCompletions")
        assert (count, started) == (1, 1)
        assert edge.registry.value("internvl_rpc_in_progress", rpc="Http/ChatCompletions") == 0


async def test_before_it_is_ready_only_life_is_told() -> None:
    async with edge_over(gateway_without_redis(), ready=False) as edge:
        assert [(await edge.client.get(path)).status_code for path in OPEN] == [503, 200, 503]
        refused = await edge.chat("Hi")
        assert error_of(refused)[:2] == (503, "NOT_READY")
        assert refused.headers["retry-after"] == "1"
        edge.calls.ready = True
        assert (await edge.client.get("/health")).json() == {"status": "ok"}


@asynccontextmanager
async def streaming(*script: Any, **body: Any) -> AsyncIterator[tuple[Edge, Any, AsyncIterator[str]]]:
    """An edge with a stream that has brought its first event."""
    async with (
        edge_over(gateway_without_redis([STARTED, *script])) as edge,
        edge.client.stream(
            "POST", CHAT, json={"messages": [{"role": "user", "content": "Hi"}], "stream": True} | body
        ) as response,
    ):
        lines = response.aiter_lines()
        assert "assistant" in await anext(lines)
        yield edge, response, lines


async def test_a_drain_lets_streams_finish_and_lets_nobody_in() -> None:
    gate = asyncio.Event()
    async with streaming(gate, Delta("late"), Generated(FinishReason.STOP)) as (edge, _, lines):
        assert edge.calls.running_count == 1
        drain = asyncio.create_task(edge.calls.drain(30))
        await asyncio.sleep(0)
        assert (await edge.chat("Hi")).status_code == 503
        assert not drain.done()
        gate.set()
        assert "[DONE]" in "".join([line async for line in lines])
        await drain


async def test_a_stream_that_is_cut_says_so() -> None:
    async with streaming(asyncio.Event()) as (edge, _, lines):
        await edge.calls.drain(0)
        [event] = events_of("\n\n".join([line async for line in lines]))
        assert event["error"]["code"] == "NOT_READY"
        assert edge.gateway.llm.open == 0


async def test_an_answer_that_is_cut_before_it_began_is_a_503() -> None:
    llm_waits: Script = [asyncio.Event()]
    async with edge_over(gateway_without_redis(llm_waits)) as edge:
        asking = asyncio.create_task(edge.chat("Hi"))
        await edge.gateway.llm.waiting.wait()
        await edge.calls.drain(0)
        assert error_of(await asking)[:2] == (503, "NOT_READY")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_ends_its_answer(stream: bool) -> None:
    async with edge_over(gateway_without_redis([STARTED, Delta("A "), asyncio.Event()])) as edge:
        asking = asyncio.create_task(edge.chat("Hi", stream=stream))
        await edge.gateway.llm.waiting.wait()
        assert edge.calls.running_count == 1
        with structlog.testing.capture_logs() as logged:
            asking.cancel()
            await asyncio.wait({asking})
            await edge.calls.drain(30)
        assert edge.gateway.llm.open == 0
        assert [entry["code"] for entry in logged if entry["event"] == "call_finished"] == ["CANCELLED"]


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error() -> None:
    async with edge_over(gateway_without_redis()) as edge:
        _, writer = await asyncio.open_connection(*edge.host)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        writer.write(b"Content-Length: 100\r\n\r\n{")
        await writer.drain()
        while not edge.calls.running_count:
            await asyncio.sleep(0)
        with structlog.testing.capture_logs() as logged:
            writer.close()
            await edge.calls.drain(30)
        assert [entry["event"] for entry in logged] == ["call_finished"]
        assert logged[0]["code"] == "CANCELLED"


async def test_a_client_that_takes_nothing_is_given_up() -> None:
    endless = [Delta("x" * 50_000)] * 400
    gateway = gateway_without_redis([STARTED, *endless, Generated(FinishReason.STOP)])
    async with edge_over(gateway, bounds=Bounds(stall_s=0.2)) as edge:
        reader, writer = await asyncio.open_connection(*edge.host, limit=1024)
        body = b'{"messages": [{"role": "user", "content": "Hi"}], "stream": true}'
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with structlog.testing.capture_logs() as logged:
            writer.write(head.encode() + body)
            await writer.drain()
            while not any(entry["event"] == "call_finished" for entry in logged):
                await asyncio.sleep(0.01)
        finished = [entry for entry in logged if entry["event"] == "call_finished"]
        assert [(entry["code"], entry["reason"]) for entry in finished] == [("RESOURCE_EXHAUSTED", "CLIENT_TOO_SLOW")]
        assert gateway.llm.open == 0
        with pytest.raises((ConnectionError, EOFError)):
            await reader.readexactly(400 * 50_000)
        writer.close()


async def test_metrics_are_for_this_machine_where_there_are_no_keys() -> None:
    async with edge_over(gateway_without_redis(), gate=KeyGate(_no_keys())) as edge:
        assert "internvl_rpc_started_total" in (await edge.client.get("/metrics")).text
        for name in ("x-forwarded-for", "forwarded", "x-real-ip"):
            assert error_of(await edge.client.get("/metrics", headers={name: "127.0.0.1"}))[0] == 403


async def test_metrics_are_for_operators_where_there_are_keys(guarded: Edge) -> None:
    found = await guarded.client.get("/metrics", headers={"authorization": "Bearer right"})
    assert error_of(found)[:2] == (403, "NOT_PERMITTED")


async def test_without_metrics_there_is_nothing() -> None:
    async with edge_over(gateway_without_redis(), expose=lambda: None) as edge:
        assert error_of(await edge.client.get("/metrics"))[0] == 404


async def test_the_reference_loads_nothing_from_elsewhere() -> None:
    async with edge_over(gateway_without_redis()) as edge:
        page = await edge.client.get("/docs")
        assert "POST /v1/chat/completions" in page.text
        assert "http:" not in page.text
        assert "https:" not in page.text
        assert "<script" not in page.text
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        document = (await edge.client.get("/openapi.json")).json()
        assert "security" not in str(document["paths"])


async def test_a_medium_is_sent_once_and_named_afterwards() -> None:
    async with edge_over(gateway_without_redis()) as edge:
        sent = await edge.client.put(f"/v1/media/{digest_of(CAT)}", content=CAT)
        url = sent.json()["url"]
        assert (sent.status_code, url) == (200, f"ivl:sha256:{digest_of(CAT)}")
        answer = await edge.chat(words("What?"), {"type": "image_url", "image_url": {"url": url}})
        assert answer.json()["internvl"]["receipts"][0]["media_digest"] == digest_of(CAT)
        wrong = await edge.client.put(f"/v1/media/{'ab' * 32}", content=CAT)
        assert error_of(wrong)[:2] == (400, "MEDIA_DIGEST_MISMATCH")
        assert error_of(await edge.client.put("/v1/media/x", content=CAT)) == (400, "INVALID_REQUEST", "digest")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, identity\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFFFFFFFF\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
async def test_what_is_no_request_is_refused_and_harms_nobody(request_bytes: bytes) -> None:
    async with edge_over(gateway_without_redis()) as edge:
        answer = await raw(edge, request_bytes)
        assert answer == b"" or status_of(answer) in (400, 404)
        assert b"Traceback" not in answer
        assert (await edge.chat("Hi")).status_code == 200


async def test_a_body_in_tiny_pieces_is_read() -> None:
    async with edge_over(gateway_without_redis()) as edge:
        body = b'{"messages": [{"role": "user", "content": "Hi"}]}'
        pieces = b"".join(b"1\r\n" + bytes([byte]) + b"\r\n" for byte in body)
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        )
        answer = await raw(edge, head + b"Transfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n")
        assert status_of(answer) == 200


async def test_a_taken_port_is_one_clear_error() -> None:
    async with edge_over(gateway_without_redis()) as edge:
        with pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1:\d+ .*choose another --http-listen"):
            async with answering(lambda *_: None, HttpOptions(edge.address)):  # type: ignore[arg-type,return-value]
                pass


async def test_a_port_that_is_only_a_preference_gives_way_to_a_free_one(tmp_path: Path) -> None:
    async with edge_over(gateway_without_redis()) as edge:
        file = tmp_path / "address"
        options = HttpOptions(edge.address, file, port_fallback=True)
        async with answering(lambda *_: None, options) as address:  # type: ignore[arg-type,return-value]
            assert address != edge.address
            assert file.read_text() == address
        assert (await edge.chat("Hi")).status_code == 200
    async with answering(lambda *_: None, options) as address:  # type: ignore[arg-type,return-value]
        assert address == edge.address  # now it is free


async def test_a_host_that_is_not_ours_is_an_error_with_a_preferred_port_too() -> None:
    with pytest.raises(OSError, match=r"cannot listen on 192\.0\.2\.1:8000 "):  # of nobody, by RFC 5737
        async with answering(lambda *_: None, HttpOptions("192.0.2.1:8000", port_fallback=True)):  # type: ignore[arg-type,return-value]
            pass


def _no_keys() -> Any:
    from gateway.keys import KeyRing

    return KeyRing()
