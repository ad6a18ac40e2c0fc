"""The topology of production on this machine, from the manifests' own settings, with TLS and keys, by real clients."""

import base64
import shutil
import ssl
from collections.abc import Iterator

import pytest
from openai import AuthenticationError, DefaultHttpxClient, OpenAI

from internvl_client import CacheTier, Client, GenerationConfig, Image, TlsFiles, UnauthenticatedError, UnavailableError
from tests.deploy.production import Production, production
from tests.e2e.golden_cases import checkpoint_directory
from tests.golden_cases import CHECKPOINTS, GOLDEN

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl, which renders the manifests, is not here"),
]
PICTURE = GOLDEN / "images" / "rgb_landscape.png"
CONFIG = GenerationConfig(max_output_tokens=12)
QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Production]:
    with production(checkpoint_directory(CHECKPOINTS[0]), tmp_path_factory.mktemp("production")) as running:
        yield running


def grpc_client(system: Production, gateway: int, api_key: str | None = None) -> Client:
    return Client(
        system.gateways[gateway], api_key=api_key or system.api_key, tls=TlsFiles(system.ca_file), timeout_s=60
    )


def openai_client(system: Production, gateway: int, api_key: str | None = None) -> OpenAI:
    return OpenAI(
        base_url=f"https://{system.http_addresses[gateway]}/v1",
        api_key=api_key or system.api_key,
        http_client=DefaultHttpxClient(verify=ssl.create_default_context(cafile=system.ca_file)),
        max_retries=0,
    )


def test_both_clients_get_the_same_answer_from_every_gateway(system: Production) -> None:
    answers = set()
    for gateway in range(len(system.gateways)):
        with grpc_client(system, gateway) as client:
            answers.add(client.ask(Image.open(PICTURE), QUESTION, config=CONFIG).text)
        url = f"data:image/png;base64,{base64.b64encode(PICTURE.read_bytes()).decode()}"
        with openai_client(system, gateway) as client:
            (model,) = client.models.list().data
            completion = client.chat.completions.create(
                model=model.id,
                max_tokens=CONFIG.max_output_tokens,
                temperature=0,
                messages=[
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": url}},
                            {"type": "text", "text": QUESTION},
                        ],
                    }
                ],
            )
        answers.add(completion.choices[0].message.content)
    assert len(answers) == 1
    assert answers.pop()


def test_a_picture_seen_through_one_gateway_is_not_encoded_again_through_the_other(system: Production) -> None:
    picture = Image.open(GOLDEN / "images" / "rgb_portrait.png")
    with grpc_client(system, 0) as first, grpc_client(system, 1) as second:
        before = first.ask(picture, QUESTION, config=CONFIG)
        after = second.ask(picture, QUESTION, config=CONFIG)
    assert before.receipts[0].cache_tier is CacheTier.NONE
    assert after.receipts[0].cache_tier in (CacheTier.LOCAL, CacheTier.STORE)
    assert after.text == before.text


def test_a_conversation_goes_on_at_another_gateway(system: Production) -> None:
    with grpc_client(system, 0) as first, grpc_client(system, 1) as second:
        conversation = first.create_conversation()
        conversation.ask(Image.open(PICTURE), QUESTION, config=CONFIG)
        elsewhere = second.conversation(conversation.conversation_id)
        assert elsewhere.ask("And now?", config=CONFIG).text
        assert len(list(elsewhere.messages())) == 4


def test_nobody_is_let_in_without_a_key_or_with_another(system: Production) -> None:
    with grpc_client(system, 0, api_key="ivl_" + "x" * 43) as client, pytest.raises(UnauthenticatedError):
        client.ask(QUESTION)
    with openai_client(system, 0, api_key="sk-wrong") as client, pytest.raises(AuthenticationError):
        client.models.list()


def test_nobody_is_answered_in_plaintext(system: Production) -> None:
    with Client(system.gateways[0], timeout_s=10) as client, pytest.raises(UnavailableError):
        client.ask(QUESTION)


def test_a_stage_answers_only_those_who_show_a_certificate(system: Production) -> None:
    address = str(system.services["llm"][0].address)
    tls = TlsFiles(system.ca_file, server_name="internvl-stage")
    with Client(address, tls=tls, timeout_s=10) as client, pytest.raises(UnavailableError):
        client.ask(QUESTION)
