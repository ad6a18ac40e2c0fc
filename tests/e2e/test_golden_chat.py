"""The model card's own answers, through client, gateway, vision service, Redis and LLM service as processes."""

import asyncio
from collections.abc import Callable, Iterator

import pytest

from deploy.local import LocalStack
from internvl_client import Answer, AsyncClient, Client, messages_from_card, parts_from_card
from tests.e2e.conftest import StartStack
from tests.e2e.golden_cases import (
    case_ids,
    checkpoint_directory,
    config_of,
    find_case,
    images_of,
    read_cases,
    up_to_stop,
)
from tests.golden_cases import CHECKPOINTS, UNSAFE_CASES

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def addresses(stack: LocalStack, start_stack: StartStack) -> Iterator[Callable[[str], str]]:
    """Tells where a checkpoint is served, starting it when first asked."""
    running = {CHECKPOINTS[0]: stack}

    def address_of(checkpoint: str) -> str:
        if checkpoint not in running:
            running[checkpoint] = start_stack(checkpoint_directory(checkpoint))
        return running[checkpoint].address

    yield address_of
    for checkpoint in CHECKPOINTS[1:]:
        if checkpoint in running:
            running[checkpoint].stop()


@pytest.fixture
def golden_client(checkpoint: str, addresses: Callable[[str], str]) -> Iterator[Client]:
    with Client(addresses(checkpoint), timeout_s=60) as client:
        yield client


def ids(answer: Answer) -> tuple[list[int], list[int]]:
    return list(answer.prompt_token_ids), list(answer.token_ids)


@pytest.mark.parametrize(("checkpoint", "name"), case_ids("chat"))
def test_a_chat_gives_the_reference_ids(checkpoint: str, name: str, golden_client: Client) -> None:
    case = find_case(checkpoint, name)
    messages = messages_from_card(
        case["question"],
        images_of(checkpoint, case),
        case["num_patches_list"],
        case["history_in"],
        literal_tags=True,
    )
    answer = golden_client.ask(
        *messages, system_message=case.get("system_message"), config=config_of(case), return_token_ids=True
    )
    if name in UNSAFE_CASES:
        assert list(answer.prompt_token_ids) != case["input_ids"], UNSAFE_CASES[name]
    else:
        assert ids(answer) == (case["input_ids"], case["output_ids"])


@pytest.mark.parametrize(("checkpoint", "name"), case_ids("turns"))
def test_turns_without_a_kept_conversation_give_the_reference_ids(
    checkpoint: str, name: str, golden_client: Client
) -> None:
    case = find_case(checkpoint, name)
    images = images_of(checkpoint, case)
    for turn in case["turns"]:
        messages = messages_from_card(
            turn["question"], images, case["num_patches_list"], turn["history_in"], literal_tags=True
        )
        answer = golden_client.ask(*messages, config=config_of(case), return_token_ids=True)
        assert ids(answer) == (turn["input_ids"], turn["output_ids"])


@pytest.mark.parametrize(("checkpoint", "name"), case_ids("turns"))
def test_turns_of_a_kept_conversation_give_the_reference_ids(checkpoint: str, name: str, golden_client: Client) -> None:
    case = find_case(checkpoint, name)
    images = images_of(checkpoint, case)
    conversation = golden_client.create_conversation()
    for number, turn in enumerate(case["turns"]):
        parts = parts_from_card(
            turn["question"],
            images if number == 0 else [],
            case["num_patches_list"] if number == 0 else None,
            literal_tags=True,
        )
        answer = conversation.ask(*parts, config=config_of(case), return_token_ids=True)
        assert ids(answer) == (turn["input_ids"], turn["output_ids"])


@pytest.mark.parametrize(("checkpoint", "name"), case_ids("batch"))
async def test_a_batch_is_as_many_chats_at_once(checkpoint: str, name: str, addresses: Callable[[str], str]) -> None:
    case = find_case(checkpoint, name)
    images = images_of(checkpoint, case) or [None] * len(case["questions"])
    stop_id = read_cases(checkpoint)["eos_token_id"]
    async with AsyncClient(addresses(checkpoint), timeout_s=60) as client:
        answers = await asyncio.gather(
            *(
                client.ask(
                    *parts_from_card(question, [image] if image else []), config=config_of(case), return_token_ids=True
                )
                for question, image in zip(case["questions"], images, strict=True)
            )
        )
    assert [list(answer.token_ids) for answer in answers] == [up_to_stop(row, stop_id) for row in case["output_ids"]]
