"""The LLM service fetches embeddings from replicas that want certificates, by addresses that no certificate has."""

from pathlib import Path

import grpc
import pytest

from internvl_serving.vision.v1 import vision_service_pb2_grpc
from shared.errors import EmbeddingNotFound
from shared.rpc.tls import server_credentials
from tests.rpc.llm_calls import ScriptedVision, error_of, handle, picture_prompt, request, running, text_of
from tests.tls_certificates import Authority

NAME = "stages.internal"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


async def test_an_embedding_is_fetched_by_who_shows_a_certificate(tmp_path: Path, authority: Authority) -> None:
    own, vision = authority.issue("llm", NAME), ScriptedVision()
    server = grpc.aio.server()
    vision_service_pb2_grpc.add_VisionServiceServicer_to_server(vision, server)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(authority.issue("vision", NAME)))
    await server.start()
    issued = handle(f"127.0.0.1:{port}")
    vision.held.add(issued.digest)
    shown = {"stage_ca_file": own.ca_file, "stage_cert_file": own.cert_file, "stage_key_file": own.key_file}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    async with running(tmp_path / "first", **shown, stage_name=NAME) as stub:
        assert await text_of(stub.Generate(request(picture_prompt(issued))))
    assert vision.asked == [issued.digest]
    async with running(tmp_path / "second", stage_ca_file=own.ca_file, stage_name=NAME) as stub:
        assert isinstance(await error_of(stub.Generate(request(picture_prompt(issued)))), EmbeddingNotFound)
    assert vision.asked == [issued.digest]
    await server.stop(None)
