"""Conversations that outgrow the model's context, and answers that are left, in a whole system."""

import io
from collections.abc import Iterator

import pytest
from PIL import Image as Picture

from deploy.local import LocalStack
from internvl_client import Client, ContextOverflow, Image, InvalidRequestError
from tests.e2e.conftest import StartStack
from tests.e2e.golden_cases import checkpoint_directory
from tests.golden_cases import CHECKPOINTS

pytestmark = pytest.mark.e2e
DROP = ContextOverflow.DROP_OLDEST_TURNS
QUESTION = "word " * 6


@pytest.fixture(scope="module")
def narrow(start_stack: StartStack) -> Iterator[LocalStack]:
    """A system whose model has a small context."""
    stack = start_stack(checkpoint_directory(CHECKPOINTS[0]), LLM_MAX_CONTEXT_TOKENS="512")
    yield stack
    stack.stop()


def drawn() -> Image:
    stream = io.BytesIO()
    Picture.linear_gradient("L").resize((300, 200)).convert("RGB").save(stream, "PNG")
    return Image.from_bytes(stream.getvalue(), max_tiles=1)


def test_a_conversation_goes_on_past_the_context(narrow: LocalStack) -> None:
    with Client(narrow.address, timeout_s=60) as client:
        conversation = client.create_conversation()
        answers = [conversation.ask(drawn(), QUESTION, max_output_tokens=8, context_overflow=DROP)]
        while answers[-1].num_dropped_turns < 3 and len(answers) < 40:
            answers.append(conversation.ask(QUESTION, max_output_tokens=8, context_overflow=DROP))
        dropped = [answer.num_dropped_turns for answer in answers]
        assert dropped[0] == 0
        assert dropped == sorted(dropped)
        assert dropped[-1] >= 3
        assert all(answer.usage.num_prompt_tokens <= 512 - 8 for answer in answers)
        assert [bool(answer.receipts) for answer in answers] == [count == 0 for count in dropped]
        assert conversation.info().num_messages == 2 * len(answers)
        with pytest.raises(InvalidRequestError) as caught:
            conversation.ask(QUESTION, max_output_tokens=8)
        assert caught.value.reason == "PROMPT_TOO_LONG"


def test_an_answer_that_is_left_is_kept_as_far_as_it_was_heard(narrow: LocalStack) -> None:
    with Client(narrow.address, timeout_s=60) as client:
        conversation = client.create_conversation()
        with conversation.stream(
            "Tell a story.", max_output_tokens=400, ignore_end=True, keep_partial_answer=True, turn_id="t1"
        ) as stream:
            heard = "".join(next(stream).text for _ in range(3))
        # Sent again it waits for the first call to be put away, and is answered anew in its place.
        whole = conversation.ask("Tell a story.", max_output_tokens=400, ignore_end=True, turn_id="t1")
        assert whole.text.startswith(heard)
        assert not whole.replayed
        assert [message.cut_off for message in conversation.messages()] == [False, False]
