"""URLs of media at a gateway that runs: refused as the operator's list and the network's borders say."""

import json
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from deploy.local import LocalStack
from tests.e2e.conftest import StartStack
from tests.e2e.golden_cases import checkpoint_directory
from tests.golden_cases import CHECKPOINTS

pytestmark = pytest.mark.e2e
PLACE = "messages[0].content[0].image_url.url"


def refusal(stack: LocalStack, url: str) -> dict[str, str]:
    """The error of a question about what lies behind a URL."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": f"And {url}?"}]
    body = json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 1}).encode()
    address = f"http://{stack.http_address}/v1/chat/completions"
    with pytest.raises(HTTPError) as answer:
        urlopen(Request(address, body, {"content-type": "application/json"}))
    assert answer.value.code == 400
    error: dict[str, str] = json.load(answer.value)["error"]
    assert (error["code"], error["param"]) == ("REMOTE_URL_REFUSED", PLACE)
    return error


def test_a_gateway_fetches_nothing_unless_it_was_told_from_where(stack: LocalStack) -> None:
    assert "fetches no URLs" in refusal(stack, "https://pictures.example/a.png")["message"]


def test_a_gateway_that_fetches_reaches_nothing_inside(start_stack: StartStack) -> None:
    stack = start_stack(checkpoint_directory(CHECKPOINTS[0]), GATEWAY_REMOTE_MEDIA_HOSTS="localhost:8443,localhost")
    try:
        assert "does not fetch from this host" in refusal(stack, "https://pictures.example/a.png")["message"]
        assert "form https://host/path" in refusal(stack, "https://127.0.0.1/a.png")["message"]
        inside = {refusal(stack, url)["message"] for url in ("https://localhost/a.png", "https://localhost:8443/a.png")}
        assert inside == {"The host of this URL cannot be reached."}
    finally:
        stack.stop()
