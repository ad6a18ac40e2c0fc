"""The whole system with mutual TLS on every link, as processes: it answers, and lets in who has a certificate."""

import io
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image as Picture

from deploy.local import LocalStack
from internvl_client import Client, Image, TlsFiles, UnavailableError
from tests.e2e.conftest import StartStack
from tests.e2e.golden_cases import checkpoint_directory
from tests.golden_cases import CHECKPOINTS
from tests.tls_certificates import Authority

pytestmark = pytest.mark.e2e
NAME = "internvl.internal"  # what every service's certificate bears, whatever address it has


def picture(colour: str) -> Image:
    file = io.BytesIO()
    Picture.new("RGB", (64, 64), colour).save(file, "PNG")
    return Image.from_bytes(file.getvalue())


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def encrypted(start_stack: StartStack, authority: Authority) -> Iterator[LocalStack]:
    """A system whose services show each other certificates; its store is given nothing, so embeddings cross a link."""
    environment = {"VISION_EMBEDDING_WRITE_BYTES": "1", "VISION_PICTURE_PROCESSES": "1", "VISION_VIDEO_PROCESSES": "1"}
    for service in ("gateway", "vision", "llm"):
        own = authority.issue(service, NAME)
        prefix = service.upper()
        environment |= {
            f"{prefix}_TLS_CERT_FILE": str(own.cert_file),
            f"{prefix}_TLS_KEY_FILE": str(own.key_file),
            f"{prefix}_TLS_CLIENT_CA_FILE": str(authority.ca_file),
        }
        if service != "vision":
            environment |= {
                f"{prefix}_STAGE_CA_FILE": str(authority.ca_file),
                f"{prefix}_STAGE_CERT_FILE": str(own.cert_file),
                f"{prefix}_STAGE_KEY_FILE": str(own.key_file),
                f"{prefix}_STAGE_NAME": NAME,
            }
    stack = start_stack(checkpoint_directory(CHECKPOINTS[0]), **environment)
    yield stack
    stack.stop()


def files_of(authority: Authority, *, shown: bool = True) -> TlsFiles:
    own = authority.issue("client")
    return TlsFiles(
        authority.ca_file, own.cert_file if shown else None, own.key_file if shown else None, server_name=NAME
    )


def test_a_client_with_a_certificate_gets_an_answer_about_a_picture(
    encrypted: LocalStack, authority: Authority
) -> None:
    with Client(encrypted.address, tls=files_of(authority), timeout_s=120) as client:
        answer = client.ask(picture("red"), "What is it?", max_output_tokens=4)
    assert answer.usage.num_output_tokens > 0
    assert answer.receipts


def test_the_embedding_went_from_the_vision_service_to_the_llm_service(
    encrypted: LocalStack, authority: Authority
) -> None:
    with Client(encrypted.address, tls=files_of(authority), timeout_s=120) as client:
        client.ask(picture("blue"), "What is it?", max_output_tokens=2)
    fetches = [line for line in _log_of(encrypted, "vision") if "VisionService/FetchEmbedding" in line]
    assert fetches
    assert all('"code":"OK"' in line.replace(" ", "") for line in fetches)


@pytest.mark.parametrize("service", ["gateway", "vision", "llm"])
def test_without_a_certificate_no_service_lets_anybody_in(
    service: str, encrypted: LocalStack, authority: Authority
) -> None:
    address = encrypted.service(service).address
    assert address is not None
    with Client(address, tls=files_of(authority, shown=False)) as client, pytest.raises(UnavailableError):
        client.is_ready(timeout_s=30)
    with Client(address) as plaintext, pytest.raises(UnavailableError):
        plaintext.is_ready(timeout_s=30)


@pytest.mark.parametrize("service", ["gateway", "vision", "llm"])
def test_every_service_answers_probes_in_plaintext_on_its_health_port(service: str, encrypted: LocalStack) -> None:
    address = (encrypted.directory / f"{service}-health.address").read_text()
    with grpc.insecure_channel(address) as channel:
        checks = health_pb2_grpc.HealthStub(channel)
        for name in ("startup", "readiness", "liveness"):
            answer = checks.Check(health_pb2.HealthCheckRequest(service=name), timeout=30)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING, name


def _log_of(stack: LocalStack, service: str) -> list[str]:
    return (Path(stack.directory) / f"{service}.log").read_text().splitlines()
