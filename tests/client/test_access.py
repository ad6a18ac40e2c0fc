"""A client shows its key and its certificate, makes sure whom it talks to, and never gives the key away."""

from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from internvl_client import AsyncClient, Client, InternVLError, TlsFiles, UnavailableError
from internvl_client.access import Access, is_loopback
from tests.client.command_line import run
from tests.tls_certificates import Authority

KEY = "sk-CANARY"


@dataclass
class Gate:
    """A server that knows health checks only; notes the metadata of every call."""

    address: str = ""
    seen: list[dict[str, str | bytes]] = field(default_factory=list)


class _Noting(grpc.ServerInterceptor):
    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        self._gate.seen.append(dict(details.invocation_metadata))
        return continuation(details)


@contextmanager
def gate(credentials: grpc.ServerCredentials | None = None) -> Iterator[Gate]:
    noted = Gate()
    server = grpc.server(futures.ThreadPoolExecutor(2), interceptors=[_Noting(noted)])
    checks = health.HealthServicer()
    checks.set("readiness", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    port = (
        server.add_secure_port("127.0.0.1:0", credentials) if credentials else server.add_insecure_port("127.0.0.1:0")
    )
    noted.address = f"127.0.0.1:{port}"
    server.start()
    try:
        yield noted
    finally:
        server.stop(None).wait()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


def credentials_of(authority: Authority, *hosts: str, wants_certificates: bool = False) -> grpc.ServerCredentials:
    content = authority.issue("gateway", *hosts).read()
    assert content.key is not None
    assert content.cert_chain is not None
    return grpc.ssl_server_credentials([(content.key, content.cert_chain)], content.ca, wants_certificates)


def test_a_key_goes_with_every_call_as_a_bearer_token() -> None:
    with gate() as server, Client(server.address, api_key=KEY, metadata=[("x-team", "a")]) as client:
        assert client.is_ready()
        assert client.is_ready()
    assert [(call["authorization"], call["x-team"]) for call in server.seen] == [(f"Bearer {KEY}", "a")] * 2


async def test_the_asyncio_client_sends_its_key_too() -> None:
    with gate() as server:
        async with AsyncClient(server.address, api_key=KEY) as client:
            assert await client.is_ready()
    assert server.seen[0]["authorization"] == f"Bearer {KEY}"


def test_without_a_key_nothing_is_said_of_one() -> None:
    with gate() as server, Client(server.address) as client:
        client.is_ready()
    assert "authorization" not in server.seen[0]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_key_is_not_sent_unencrypted_to_another_machine(kind: Any) -> None:
    with pytest.raises(ValueError, match="unencrypted") as caught:
        kind("gateway.example:50051", api_key=KEY)
    assert KEY not in str(caught.value)


def test_a_key_is_sent_unencrypted_to_another_machine_where_that_is_meant() -> None:
    access = Access.to("gateway.example:50051", api_key=KEY, insecure=True)
    assert access.metadata == (("authorization", f"Bearer {KEY}"),)
    assert access.credentials is None


def test_with_tls_a_key_may_go_anywhere() -> None:
    assert Access.to("gateway.example:50051", api_key=KEY, tls=True).credentials is not None


@pytest.mark.parametrize(
    ("address", "stays"),
    [
        ("127.0.0.1:50051", True),
        ("127.8.0.1:50051", True),
        ("localhost:50051", True),
        ("[::1]:50051", True),
        ("unix:/run/gateway.sock", True),
        ("dns:///localhost:50051", True),
        ("ipv4:127.0.0.1:50051", True),
        ("gateway.example:50051", False),
        ("localhost.example:50051", False),
        ("127.0.0.1.example:50051", False),
        ("10.0.0.1:50051", False),
        ("0.0.0.0:50051", False),
        ("[::]:50051", False),
        ("dns://localhost/gateway.example:50051", False),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", False),
        ("xds:///localhost", False),
        ("", False),
    ],
)
def test_which_addresses_are_known_to_be_of_this_machine(address: str, stays: bool) -> None:
    assert is_loopback(address) is stays


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel", "x" * 1025])
def test_what_cannot_be_a_key_is_refused_without_being_quoted(key: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII") as caught:
        Client("127.0.0.1:1", api_key=key)
    assert key not in str(caught.value)


def test_a_key_is_not_shown_where_the_client_s_access_is() -> None:
    assert KEY not in repr(Access.to("127.0.0.1:1", api_key=KEY))


def test_a_gateway_with_a_certificate_of_the_authority_is_trusted(authority: Authority) -> None:
    with gate(credentials_of(authority)) as server, Client(server.address, tls=TlsFiles(authority.ca_file)) as client:
        assert client.is_ready()


def test_a_gateway_that_asks_for_a_certificate_is_shown_one(authority: Authority) -> None:
    own = authority.issue("caller")
    with gate(credentials_of(authority, wants_certificates=True)) as server:
        with Client(server.address, tls=TlsFiles(authority.ca_file, own.cert_file, own.key_file)) as client:
            assert client.is_ready()
        with Client(server.address, tls=TlsFiles(authority.ca_file)) as client:
            assert "wants TLS, or a certificate" in absence_at(client)


def test_a_gateway_s_certificate_may_bear_another_name_than_its_address(authority: Authority) -> None:
    with gate(credentials_of(authority, "gateway.internal")) as server:
        with Client(server.address, tls=TlsFiles(authority.ca_file, server_name="gateway.internal")) as client:
            assert client.is_ready()
        with Client(server.address, tls=TlsFiles(authority.ca_file)) as client:
            assert "TLS with" in absence_at(client)


def test_a_gateway_that_nobody_vouches_for_is_sent_nothing(authority: Authority) -> None:
    with gate(credentials_of(authority)) as server:
        with Client(server.address, tls=True, api_key=KEY) as client:
            assert "TLS with" in absence_at(client)
        assert server.seen == []


def test_who_forgets_tls_is_told_of_it(authority: Authority) -> None:
    with gate(credentials_of(authority)) as server, Client(server.address) as client:
        assert "wants TLS" in absence_at(client)


def test_who_wants_tls_where_there_is_none_is_told_of_it() -> None:
    with gate() as server, Client(server.address, tls=True) as client:
        assert "speaks no TLS" in absence_at(client)


def absence_at(client: Client) -> str:
    with pytest.raises(UnavailableError) as caught:
        client.is_ready(timeout_s=20)
    return str(caught.value)


def test_files_that_are_no_certificates_are_named(authority: Authority, tmp_path: Path) -> None:
    own, other = authority.issue("caller"), authority.issue("other")
    text = tmp_path / "text.pem"
    text.write_text("nothing")
    with pytest.raises(ValueError, match=str(text)):
        Client("127.0.0.1:1", tls=TlsFiles(text))
    with pytest.raises(ValueError, match=f"{own.cert_file} and {other.key_file}"):
        Client("127.0.0.1:1", tls=TlsFiles(authority.ca_file, own.cert_file, other.key_file))
    with pytest.raises(ValueError, match="both or neither"):
        Client("127.0.0.1:1", tls=TlsFiles(authority.ca_file, own.cert_file))
    with pytest.raises(FileNotFoundError):
        Client("127.0.0.1:1", tls=TlsFiles(tmp_path / "absent.pem"))
    with pytest.raises(ValueError, match="not both"):
        Client("127.0.0.1:1", tls=True, credentials=grpc.ssl_channel_credentials())


@pytest.mark.parametrize(
    ("code", "retry_after_s", "again"),
    [
        (grpc.StatusCode.UNAVAILABLE, None, True),
        (grpc.StatusCode.ABORTED, None, True),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 2.0, True),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, None, False),  # a message that is too large stays so
        (grpc.StatusCode.INVALID_ARGUMENT, None, False),
        (grpc.StatusCode.DEADLINE_EXCEEDED, None, False),
        (grpc.StatusCode.INTERNAL, None, False),
    ],
)
def test_an_error_says_whether_the_same_call_may_succeed_later(
    code: grpc.StatusCode, retry_after_s: float | None, again: bool
) -> None:
    assert InternVLError("No.", code=code, retry_after_s=retry_after_s).is_retryable is again


def test_commands_take_key_and_certificates_from_options_and_variables(
    authority: Authority, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with gate(credentials_of(authority)) as server:
        options = ("--address", server.address, "--tls-ca", authority.ca_file)
        assert run(capsys, monkeypatch, "status", *options, "--api-key", KEY)[0] in (None, 0)
        monkeypatch.setenv("INTERNVL_API_KEY", "from-the-environment")
        monkeypatch.setenv("INTERNVL_TLS_CA", str(authority.ca_file))
        assert run(capsys, monkeypatch, "status", "--address", server.address)[0] in (None, 0)
    assert [call["authorization"] for call in server.seen] == [f"Bearer {KEY}", "Bearer from-the-environment"]


def test_a_command_does_not_send_a_key_unencrypted_to_another_machine_and_does_not_show_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERNVL_API_KEY", KEY)
    message, shown = run(capsys, monkeypatch, "status", "--address", "gateway.example:1")
    assert "unencrypted" in message
    assert KEY not in message + shown


@pytest.mark.parametrize("command", ["chat", "status", "batch", "bench", "prefetch", "estimate", "demo"])
def test_every_command_that_reaches_a_gateway_has_the_options_and_none_shows_the_key(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERNVL_API_KEY", KEY)
    _, shown = run(capsys, monkeypatch, command, "--help")
    for option in ("--api-key", "--tls-ca", "--tls-cert", "--tls-key", "--tls-name", "--insecure"):
        assert option in shown
    assert KEY not in shown
