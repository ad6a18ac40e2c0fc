"""Services that speak TLS: who is let in, which certificate is shown, and what happens when files are replaced."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from internvl_serving.llm.v1 import llm_service_pb2, llm_service_pb2_grpc
from shared.rpc.channel import open_channel
from shared.rpc.server import Application, serve
from shared.settings import ServiceSettings
from shared.tls_files import TlsError, TlsFiles, WatchedTls
from tests.tls_certificates import Authority

REQUEST = llm_service_pb2.CountTokensRequest()


class Doorkeeper(llm_service_pb2_grpc.LlmServiceServicer):
    """Notes the common names of callers' certificates; streams what a test puts into `words`, until None."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.words: asyncio.Queue[str | None] = asyncio.Queue()

    async def CountTokens(self, request: Any, context: Any) -> llm_service_pb2.CountTokensResponse:
        self.names += [name.decode() for name in context.auth_context().get("x509_common_name", [])]
        return llm_service_pb2.CountTokensResponse(token_count=7)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[llm_service_pb2.GenerateResponse]:
        while (word := await self.words.get()) is not None:
            yield llm_service_pb2.GenerateResponse(delta=llm_service_pb2.GenerateDelta(text=word))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@asynccontextmanager
async def serving(tmp_path: Path, tls: TlsFiles, *, asks_for_certificates: bool = True) -> AsyncIterator[Any]:
    """Run a service with TLS; yield its servicer and address."""
    servicer = Doorkeeper()

    @asynccontextmanager
    async def lifespan(settings: ServiceSettings, address: str, registry: Any) -> AsyncIterator[Application]:
        yield Application(
            lambda server: llm_service_pb2_grpc.add_LlmServiceServicer_to_server(servicer, server),
            ["internvl_serving.llm.v1.LlmService"],
        )

    settings = ServiceSettings(
        address_file=tmp_path / "address",
        health_listen="127.0.0.1:0",
        health_address_file=tmp_path / "health",
        tls_cert_file=tls.cert_file,
        tls_key_file=tls.key_file,
        tls_client_ca_file=tls.ca_file if asks_for_certificates else None,
    )
    task = asyncio.create_task(serve(settings, lifespan))
    while not (tmp_path / "address").exists():
        await asyncio.sleep(0.01)
        assert not task.done(), task.result()
    yield servicer, (tmp_path / "address").read_text()
    os.kill(os.getpid(), signal.SIGTERM)
    await task


async def count(address: str, tls: TlsFiles | None, **more: Any) -> int:
    """Make a call over a channel of its own, which gives up as soon as it cannot be made."""
    async with open_channel(address, 8 << 20, WatchedTls(tls) if tls else None, **more) as channel:
        answer = await llm_service_pb2_grpc.LlmServiceStub(channel).CountTokens(REQUEST, timeout=20)
        return int(answer.token_count)


async def test_a_caller_with_a_certificate_of_the_authority_is_answered_and_known_by_name(
    tmp_path: Path, authority: Authority
) -> None:
    async with serving(tmp_path, authority.issue("server")) as (servicer, address):
        assert await count(address, authority.issue("caller")) == 7
    assert servicer.names == ["caller"]


async def test_a_caller_without_a_certificate_is_refused_where_one_is_asked_for(
    tmp_path: Path, authority: Authority
) -> None:
    async with serving(tmp_path, authority.issue("server")) as (servicer, address):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await count(address, TlsFiles(authority.ca_file))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert servicer.names == []


async def test_a_caller_with_a_certificate_of_somebody_else_is_refused(tmp_path: Path, authority: Authority) -> None:
    foreign = replace(Authority(tmp_path / "foreign").issue("caller"), ca_file=authority.ca_file)
    async with serving(tmp_path, authority.issue("server")) as (_, address):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await count(address, foreign)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_caller_in_plaintext_is_refused(tmp_path: Path, authority: Authority) -> None:
    async with serving(tmp_path, authority.issue("server"), asks_for_certificates=False) as (_, address):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await count(address, None)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_server_with_a_certificate_of_somebody_else_is_not_trusted(
    tmp_path: Path, authority: Authority
) -> None:
    impostor = Authority(tmp_path / "foreign").issue("server")
    async with serving(tmp_path, impostor, asks_for_certificates=False) as (_, address):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await count(address, TlsFiles(authority.ca_file))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_where_nobody_asks_for_certificates_a_caller_needs_none(tmp_path: Path, authority: Authority) -> None:
    async with serving(tmp_path, authority.issue("server"), asks_for_certificates=False) as (_, address):
        assert await count(address, TlsFiles(authority.ca_file)) == 7


async def test_a_certificate_counts_for_the_name_that_was_asked_for_whatever_the_address(
    tmp_path: Path, authority: Authority
) -> None:
    caller = authority.issue("caller")
    async with serving(tmp_path, authority.issue("server", "stages.internal")) as (_, address):
        assert await count(address, caller, name="stages.internal") == 7
        assert await count(address, replace(caller, peer_name="stages.internal"), name="other") == 7
        for peer_name in ("", "other.internal"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await count(address, replace(caller, peer_name=peer_name))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_the_next_connection_is_shown_a_certificate_that_was_replaced_and_the_last_one_goes_on(
    tmp_path: Path, authority: Authority
) -> None:
    caller = authority.issue("caller")
    async with serving(tmp_path, authority.issue("server", "old.internal", file="server")) as (servicer, address):
        old = WatchedTls(replace(caller, peer_name="old.internal"))
        async with open_channel(address, 8 << 20, old) as channel:
            call = llm_service_pb2_grpc.LlmServiceStub(channel).Generate(llm_service_pb2.GenerateRequest())
            servicer.words.put_nowait("before")
            assert (await call.read()).delta.text == "before"
            authority.issue("server", "new.internal", file="server")
            assert await count(address, caller, name="new.internal") == 7
            with pytest.raises(grpc.aio.AioRpcError):
                await count(address, caller, name="old.internal")
            servicer.words.put_nowait("after")
            assert (await call.read()).delta.text == "after"
            servicer.words.put_nowait(None)
            assert await call.read() is grpc.aio.EOF


async def test_a_caller_shows_a_certificate_that_was_replaced_and_its_calls_go_on(
    tmp_path: Path, authority: Authority
) -> None:
    caller = WatchedTls(authority.issue("first", file="caller"))
    async with (
        serving(tmp_path, authority.issue("server")) as (servicer, address),
        open_channel(address, 8 << 20, caller) as channel,
    ):
        stub = llm_service_pb2_grpc.LlmServiceStub(channel)
        await stub.CountTokens(REQUEST)
        call = stub.Generate(llm_service_pb2.GenerateRequest())
        servicer.words.put_nowait("before")
        assert (await call.read()).delta.text == "before"
        authority.issue("second", file="caller")
        await stub.CountTokens(REQUEST)
        servicer.words.put_nowait("after")
        assert (await call.read()).delta.text == "after"
        servicer.words.put_nowait(None)
        assert await call.read() is grpc.aio.EOF
        await stub.CountTokens(REQUEST)
    assert servicer.names == ["first", "second", "second"]


async def test_who_watches_a_channel_sees_the_one_that_has_taken_its_place(
    tmp_path: Path, authority: Authority
) -> None:
    caller = WatchedTls(authority.issue("first", file="caller"))
    async with (
        serving(tmp_path, authority.issue("server")) as (_, address),
        open_channel(address, 8 << 20, caller) as channel,
    ):
        await channel.channel_ready()
        watching = asyncio.create_task(channel.wait_for_state_change(grpc.ChannelConnectivity.READY))
        authority.issue("second", file="caller")
        assert channel.get_state(try_to_connect=True) is not grpc.ChannelConnectivity.READY
        with suppress(grpc.aio.UsageError):  # how grpcio ends a wait for a channel that is closed
            await watching
        await channel.channel_ready()


async def test_health_is_answered_in_plaintext_on_its_own_port_and_nothing_else_is(
    tmp_path: Path, authority: Authority
) -> None:
    async with (
        serving(tmp_path, authority.issue("server")),
        grpc.aio.insecure_channel((tmp_path / "health").read_text()) as channel,
    ):
        checks = health_pb2_grpc.HealthStub(channel)
        for name in ("startup", "readiness", "liveness", "", "internvl_serving.llm.v1.LlmService"):
            async for answer in checks.Watch(health_pb2.HealthCheckRequest(service=name)):
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    break
        for method in (
            "/internvl_serving.llm.v1.LlmService/CountTokens",
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(method)(b"")
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_service_whose_certificate_cannot_be_read_does_not_start(tmp_path: Path, authority: Authority) -> None:
    files = authority.issue("server")
    assert files.key_file is not None
    files.key_file.unlink()
    with pytest.raises(TlsError, match=str(files.key_file)):
        async with serving(tmp_path, files):
            pass


@asynccontextmanager
async def slow_way_to(address: str, delay_s: float) -> AsyncIterator[str]:
    """A proxy that lets nothing through for a while after a connection was made, as a busy machine does."""
    host, _, port = address.rpartition(":")

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(delay_s)
        onward = await asyncio.open_connection(host, int(port))
        await asyncio.gather(_copy(reader, onward[1]), _copy(onward[0], writer))

    async with await asyncio.start_server(pass_on, "127.0.0.1", 0) as proxy:
        yield f"127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
        proxy.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while content := await reader.read(1 << 16):
        writer.write(content)
    writer.close()


async def test_a_handshake_that_takes_a_second_is_waited_for(tmp_path: Path, authority: Authority) -> None:
    async with (
        serving(tmp_path, authority.issue("server")) as (_, address),
        slow_way_to(address, delay_s=1.0) as slow_address,
    ):
        assert await count(slow_address, authority.issue("caller")) == 7
