"""Conversations outlive every service that answers them."""

import io
import time
from collections.abc import Iterator

import pytest
from PIL import Image as Picture

from deploy.local import LocalStack
from internvl_client import Answer, Client, Image
from tests.e2e.conftest import StartStack
from tests.e2e.golden_cases import checkpoint_directory
from tests.golden_cases import CHECKPOINTS

pytestmark = pytest.mark.e2e
SERVICES = ("gateway", "vision", "llm")


@pytest.fixture(scope="module")
def restarted(start_stack: StartStack) -> Iterator[LocalStack]:
    """A system of this module's own, to be restarted."""
    stack = start_stack(checkpoint_directory(CHECKPOINTS[0]))
    yield stack
    stack.stop()


def drawn() -> Image:
    stream = io.BytesIO()
    Picture.linear_gradient("L").resize((300, 200)).convert("RGB").save(stream, "PNG")
    return Image.from_bytes(stream.getvalue(), max_tiles=4)


def three_turns(client: Client, stack: LocalStack, restarts: tuple[str, ...]) -> list[Answer]:
    conversation = client.create_conversation(system_message="Be brief.")
    conversation_id = conversation.conversation_id
    answers = [
        conversation.ask(drawn(), "What is this?", max_output_tokens=8, return_token_ids=True),
        conversation.ask("And now?", max_output_tokens=8, return_token_ids=True),
    ]
    for name in restarts:
        stack.restart(name)
    # Whoever goes on may be another program, which has neither the picture nor the connection.
    with Client(stack.address, timeout_s=60) as other:
        kept = other.conversation(conversation_id)
        return [*answers, kept.ask("And then?", max_output_tokens=8, return_token_ids=True)]


def test_a_third_turn_is_the_same_whatever_was_restarted_before_it(restarted: LocalStack) -> None:
    with Client(restarted.address, timeout_s=60) as client:
        undisturbed = three_turns(client, restarted, ())
        for restarts in (*((name,) for name in SERVICES), SERVICES):
            disturbed = three_turns(client, restarted, restarts)
            assert [answer.token_ids for answer in disturbed] == [answer.token_ids for answer in undisturbed]
            assert disturbed[2].receipts[0].media_digest == drawn().digest
            assert disturbed[2].usage.num_prompt_tokens == undisturbed[2].usage.num_prompt_tokens


def test_a_turn_is_told_again_by_a_gateway_that_was_not_there_when_it_was_answered(restarted: LocalStack) -> None:
    with Client(restarted.address, timeout_s=60) as client:
        conversation = client.create_conversation()
        once = conversation.ask(drawn(), "What is this?", max_output_tokens=8, turn_id="t1")
        restarted.restart("gateway")
        again = conversation.ask(drawn(), "What is this?", max_output_tokens=8, turn_id="t1")
        assert (again.replayed, again.text, again.message_id) == (True, once.text, once.message_id)
        assert again.receipts == once.receipts
        assert conversation.info().num_messages == 2
        assert conversation.conversation_id in {kept.conversation_id for kept in client.conversations()}


def test_a_stream_that_is_lost_with_its_gateway_is_gone_on_with(restarted: LocalStack) -> None:
    with Client(restarted.address, timeout_s=120) as client:
        conversation = client.create_conversation()
        alone = client.ask("Say something.", max_output_tokens=400, ignore_end=True)
        with conversation.stream("Say something.", max_output_tokens=400, ignore_end=True, turn_id="t1") as stream:
            begun = str(next(stream))
            restarted.restart("gateway")
            said = begun + "".join(map(str, stream))
        assert said == alone.text
        # The gateway that was started anew has answered; its log is written behind.
        log, deadline = restarted.processes["gateway"].log_file, time.monotonic() + 30
        while '"turn_finished"' not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        assert conversation.info().num_messages == 2
