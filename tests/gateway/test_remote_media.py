"""Fetching from hosts that mean harm: each rule against a host that breaks it."""

import asyncio
import gzip
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.remote import FetchLimits, FetchMetrics, HostList, RemoteMedia, opened_remote_media
from gateway.remote.connection import Connector
from gateway.settings import GatewaySettings
from shared.errors import QueueFull, RemoteUrlRefused, ServiceError
from shared.prometheus import PrometheusRegistry
from tests.gateway.hostile_host import NAME, PNG, HostileHost, Names, OnlyThisMachine, answer, hostile_host

FIELD = "messages[0].content[1].image_url.url"
IMPATIENT = FetchLimits(timeout_s=0.3)
NOT_REACHED = "The host of this URL cannot be reached."


@pytest.fixture
async def host() -> AsyncIterator[HostileHost]:
    async with hostile_host() as server:
        yield server


async def refusal(media: RemoteMedia, url: str) -> RemoteUrlRefused:
    with pytest.raises(RemoteUrlRefused) as refused:
        await media.fetch(url, FIELD)
    assert refused.value.field == FIELD
    return refused.value


async def test_a_picture_is_fetched_by_number_under_its_name(host: HostileHost) -> None:
    assert await host.media().fetch(host.url, FIELD) == PNG
    assert host.server_names == [NAME]
    assert host.requests == [
        f"GET /a/picture.png?size=1 HTTP/1.1\r\nHost: {NAME}:{host.port}\r\nUser-Agent: internvl-serving\r\n"
        "Accept: image/*, video/*\r\nAccept-Encoding: identity\r\nConnection: close\r\n\r\n".encode()
    ]


async def test_a_video_in_chunks_is_fetched_whole(host: HostileHost) -> None:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (PNG, b"more")) + b"0\r\n\r\n"
    host.sends = answer("Content-Type: video/mp4; codecs=x", "Transfer-Encoding: chunked", body=chunks)
    assert await host.media().fetch(host.url, FIELD) == PNG + b"more"


async def test_a_body_that_ends_with_its_connection_is_fetched_whole(host: HostileHost) -> None:
    host.sends = b"HTTP/1.0 200 OK\r\nContent-Type: image/png\r\n\r\n" + PNG
    assert await host.media().fetch(host.url, FIELD) == PNG


async def test_nothing_is_fetched_where_no_host_is_listed() -> None:
    with opened_remote_media(HostList([]), FetchLimits()) as media:
        assert "fetches no URLs" in (await refusal(media, f"https://{NAME}/a.png")).message


async def test_a_host_that_is_not_listed_is_not_even_looked_up(host: HostileHost) -> None:
    names = Names(["127.0.0.1"])
    media = host.media(names=names, hosts="other.test")
    assert "does not fetch from this host" in (await refusal(media, host.url)).message
    assert (names.asked, host.connections) == ([], 0)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "[::ffff:127.0.0.1]", "0x7f.1", "2130706433", "user@pictures.test", "pictures.test\\@127.0.0.1"],
)
async def test_a_host_in_disguise_is_not_even_looked_up(host: HostileHost, address: str) -> None:
    names = Names(["127.0.0.1"])
    await refusal(host.media(names=names, hosts="*"), f"https://{address}/a.png")
    assert (names.asked, host.connections) == ([], 0)


@pytest.mark.parametrize("found", [["10.0.0.1"], ["127.0.0.1", "169.254.169.254"], ["127.0.0.1", "::1"], []])
async def test_one_address_that_is_not_allowed_forbids_the_name(host: HostileHost, found: list[str]) -> None:
    assert (await refusal(host.media(names=Names(found)), host.url)).message == NOT_REACHED
    assert host.connections == 0


async def test_the_system_s_own_name_of_this_machine_leads_nowhere(host: HostileHost) -> None:
    with opened_remote_media(HostList.parsed(f"localhost:{host.port}"), FetchLimits()) as media:
        refused = await refusal(media, f"https://localhost:{host.port}/a.png")
    assert refused.message == NOT_REACHED
    assert host.connections == 0


async def test_a_name_that_is_rebound_is_asked_for_once(host: HostileHost) -> None:
    names = Names(["127.0.0.1"], ["169.254.169.254"])
    assert await host.media(names=names).fetch(host.url, FIELD) == PNG
    assert names.asked == [NAME]


async def test_nobody_learns_why_a_host_cannot_be_reached(host: HostileHost) -> None:
    async with hostile_host() as closed:
        closed_url = closed.url
    refused = [
        await refusal(host.media(names=Names(None)), host.url),
        await refusal(host.media(names=Names(["10.0.0.1"])), host.url),
        await refusal(host.media(trusted=ssl.create_default_context()), host.url),  # nobody it trusts vouches for it
        await refusal(
            host.media(hosts="*.test:" + str(host.port)), host.url.replace(NAME, "other.test")
        ),  # not its name
        await refusal(closed.media(), closed_url),
    ]
    assert {(type(error), error.message) for error in refused} == {(RemoteUrlRefused, NOT_REACHED)}


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
@pytest.mark.parametrize("target", ["https://169.254.169.254/latest", "https://127.0.0.1/", "/elsewhere.png"])
async def test_a_redirect_is_not_followed(host: HostileHost, status: str, target: str) -> None:
    host.sends = answer(f"Location: {target}", status=status)
    error = await refusal(host.media(), host.url)
    assert "leads on to another" in error.message
    assert target not in error.message
    assert host.connections == 1


@pytest.mark.parametrize("status", ["204 No Content", "206 Partial Content", "404 Not Found", "500 secret words"])
async def test_an_answer_without_the_medium_is_refused_without_its_words(host: HostileHost, status: str) -> None:
    host.sends = answer(status=status)
    assert f"status {status[:3]}." in (await refusal(host.media(), host.url)).message


async def test_a_body_that_says_it_is_too_large_is_not_taken_in(host: HostileHost) -> None:
    host.sends = answer("Content-Length: 99999999999999")
    assert "larger than the 2000 bytes" in (await refusal(host.media(FetchLimits(max_bytes=2000)), host.url)).message


async def test_a_body_without_end_is_broken_off_at_the_limit(host: HostileHost) -> None:
    async def endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            writer.write(b"8000\r\n" + bytes(0x8000) + b"\r\n")
            await writer.drain()
            await asyncio.sleep(0)  # so that this side sees that the other has gone

    host.sends, host.script = answer("Transfer-Encoding: chunked", body=b""), endless
    assert "larger than" in (await refusal(host.media(FetchLimits(max_bytes=200_000)), host.url)).message


async def test_a_body_of_exactly_the_limit_is_taken(host: HostileHost) -> None:
    assert await host.media(FetchLimits(max_bytes=len(PNG))).fetch(host.url, FIELD) == PNG


@pytest.mark.parametrize("coding", ["gzip", "br", "identity, gzip", "GZIP"])
async def test_a_compressed_body_is_refused_unopened(host: HostileHost, coding: str) -> None:
    host.sends = answer(f"Content-Encoding: {coding}", body=gzip.compress(bytes(10_000_000)))
    assert "compressed" in (await refusal(host.media(), host.url)).message


async def test_a_chunked_body_that_is_compressed_on_the_way_is_refused(host: HostileHost) -> None:
    host.sends = answer("Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n")
    await refusal(host.media(), host.url)


@pytest.mark.parametrize(
    "kind", ["text/html", "application/octet-stream", "", "text/html, image/png", "imagex/png", "multipart/image"]
)
async def test_what_is_no_picture_or_video_is_refused(host: HostileHost, kind: str) -> None:
    host.sends = answer(f"Content-Type: {kind}")
    assert "does not call itself a picture" in (await refusal(host.media(), host.url)).message


async def test_a_body_shorter_than_it_said_is_refused(host: HostileHost) -> None:
    host.sends = answer(f"Content-Length: {len(PNG) + 1}")
    assert "HTTP" in (await refusal(host.media(), host.url)).message


async def test_of_a_body_longer_than_it_said_only_what_was_said_is_taken(host: HostileHost) -> None:
    host.sends = answer("Content-Length: 10")
    assert await host.media().fetch(host.url, FIELD) == PNG[:10]


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: -5\r\n\r\nabcdef",
        b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 100,
    ],
)
async def test_what_is_not_http_is_refused(host: HostileHost, sent: bytes) -> None:
    host.sends = sent
    assert "HTTP" in (await refusal(host.media(), host.url)).message


async def test_a_body_in_tiny_pieces_is_refused(host: HostileHost) -> None:
    host.sends = answer("Transfer-Encoding: chunked", body=b"1\r\na\r\n" * 5000)
    assert "too small pieces" in (await refusal(host.media(), host.url)).message


async def test_an_empty_body_is_refused(host: HostileHost) -> None:
    host.sends = answer(body=b"")
    assert "nothing" in (await refusal(host.media(), host.url)).message


async def test_a_body_that_drips_is_given_up(host: HostileHost) -> None:
    async def drip(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            writer.write(b"a")
            await writer.drain()
            await asyncio.sleep(0.02)

    host.sends, host.script = answer("Content-Length: 1000000", body=b""), drip
    assert "too slowly" in (await refusal(host.media(IMPATIENT), host.url)).message
    brisk = FetchLimits(grace_s=0.1, min_bytes_per_s=10_000)
    assert "too slowly" in (await refusal(host.media(brisk), host.url)).message


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Ty", answer("Content-Length: 9999")])
async def test_a_host_that_falls_silent_is_given_up(host: HostileHost, sent: bytes) -> None:
    async def silence(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    host.sends, host.script = sent, silence
    assert "too slowly" in (await refusal(host.media(FetchLimits(stall_s=0.2)), host.url)).message
    assert "too slowly" in (await refusal(host.media(IMPATIENT), host.url)).message


async def test_a_name_server_that_falls_silent_is_given_up(host: HostileHost) -> None:
    class Silent(Names):
        async def addresses_of(self, host: str) -> list[object]:  # type: ignore[override]
            return await asyncio.Future()

    assert "too slowly" in (await refusal(host.media(IMPATIENT, names=Silent([])), host.url)).message


async def test_no_proxy_of_the_environment_is_asked(host: HostileHost, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert await host.media().fetch(host.url, FIELD) == PNG


async def test_only_so_many_fetches_run_and_wait_at_once(host: HostileHost) -> None:
    served, let_go = asyncio.Queue[None](), asyncio.Event()

    async def wait(*_: object) -> None:
        served.put_nowait(None)
        await let_go.wait()
        _[1].write(answer())  # type: ignore[attr-defined]

    host.sends, host.script = b"", wait
    media = host.media(FetchLimits(parallel=2, waiting=1))
    running = [asyncio.create_task(media.fetch(host.url, FIELD)) for _ in range(3)]
    await served.get()
    await served.get()
    with pytest.raises(QueueFull) as full:
        await media.fetch(host.url, FIELD)
    assert full.value.retry_after_s
    assert host.connections == 2
    let_go.set()
    assert await asyncio.gather(*running) == [PNG] * 3


async def test_a_client_that_leaves_gives_its_place_back(host: HostileHost) -> None:
    served = asyncio.Queue[None]()

    async def silence(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        served.put_nowait(None)
        await reader.read()

    host.sends, host.script = b"", silence
    media = host.media(FetchLimits(parallel=1, waiting=0))
    fetch = asyncio.create_task(media.fetch(host.url, FIELD))
    await served.get()
    fetch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetch
    host.sends, host.script = answer(), None
    assert await media.fetch(host.url, FIELD) == PNG


async def test_what_becomes_of_fetches_is_counted(host: HostileHost) -> None:
    registry = PrometheusRegistry()
    connector = Connector(Names(["127.0.0.1"]), OnlyThisMachine(), host.tls, 5.0)
    hosts = HostList.parsed(f"{NAME}:{host.port}")
    media = RemoteMedia(hosts, connector, FetchLimits(), FetchMetrics.declared(registry))
    await media.fetch(host.url, FIELD)
    await refusal(media, "https://other.test/")
    assert registry.value("internvl_gateway_remote_fetches_total", outcome="fetched") == 1
    assert registry.value("internvl_gateway_remote_fetches_total", outcome="not_allowed") == 1
    assert registry.value("internvl_gateway_remote_fetched_bytes_total") == len(PNG)


async def test_the_log_names_no_url(host: HostileHost, capsys: pytest.CaptureFixture[str]) -> None:
    await host.media().fetch(host.url, FIELD)
    await refusal(host.media(hosts="other.test"), host.url)
    host.sends = answer(status="404 Not Found")
    await refusal(host.media(), host.url)
    logged = capsys.readouterr().out
    assert logged.count("remote_media_") == 3
    assert "picture.png" not in logged
    assert NAME not in logged


@pytest.mark.parametrize(
    "flags",
    [
        {"remote_media_hosts": "*"},
        {"remote_media_hosts": "", "remote_media_any_host": True},
        {"remote_media_hosts": "pictures.example", "remote_media_any_host": True},
        {"remote_media_hosts": "169.254.169.254"},
    ],
)
def test_settings_that_open_more_than_was_meant_are_refused(flags: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"any host|host names"):
        GatewaySettings(vision_target="a:1", llm_target="a:1", **flags)  # type: ignore[arg-type]


def test_a_fetch_is_never_larger_than_a_medium_may_be() -> None:
    settings = GatewaySettings(vision_target="a:1", llm_target="a:1", max_media_bytes=1000)
    assert settings.fetch_limits.max_bytes == 1000
    assert settings.remote_hosts.is_empty


def test_nothing_but_the_field_of_a_url_leads_to_a_fetch() -> None:
    gateway = Path(__file__).parents[2] / "gateway"
    users = {
        str(path.relative_to(gateway))
        for path in gateway.rglob("*.py")
        if "gateway.remote" in path.read_text() and path.parent.name != "remote"
    }
    assert users <= {"app.py", "settings.py"} | {name for name in users if name.startswith("http/")}


def test_a_refusal_is_an_error_that_clients_know() -> None:
    assert issubclass(RemoteUrlRefused, ServiceError)
    assert RemoteUrlRefused.reason == "REMOTE_URL_REFUSED"
