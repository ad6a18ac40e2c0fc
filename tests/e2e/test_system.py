"""What the whole system must do: together, repeatedly, and after bad input."""

import asyncio
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image as Picture

from deploy.local import LocalStack
from internvl_client import (
    Answer,
    AsyncClient,
    CacheTier,
    Client,
    FinishReason,
    GenerationConfig,
    Image,
    InternVLError,
    InvalidRequestError,
    Message,
    NotFoundError,
)
from tests.e2e.golden_cases import golden_image
from tests.golden_cases import GOLDEN

pytestmark = pytest.mark.e2e
EXAMPLES = Path(__file__).parents[2] / "examples"
PICTURE = GOLDEN / "images" / "rgb_landscape.png"


def drawn(number: int) -> Image:
    """A picture of its own size and colours."""
    picture = Picture.linear_gradient("L").resize((60 + 17 * number, 200 - 5 * number)).convert("RGB")
    picture.paste((number * 8, 255 - number * 7, 90), (number, number, number + 30, number + 25))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return Image.from_bytes(stream.getvalue(), max_tiles=1 + number % 6)


async def test_chats_at_once_give_what_each_gives_alone(stack: LocalStack) -> None:
    async with AsyncClient(stack.address, timeout_s=120) as client:

        async def chat(number: int) -> Answer:
            question = f"Question {number}: " + "what do you see here? " * (number % 7 + 1)
            return await client.ask(
                drawn(number), question, max_output_tokens=4 + number, ignore_end=True, return_token_ids=True
            )

        together = await asyncio.gather(*(chat(number) for number in range(32)))
        alone = [await chat(number) for number in range(32)]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert [len(answer.token_ids) for answer in alone] == [4 + number for number in range(32)]
    assert len({answer.token_ids[:4] for answer in alone}) > 1


async def test_one_picture_asked_about_by_many_is_encoded_once(stack: LocalStack) -> None:
    image = drawn(35)
    async with AsyncClient(stack.address, timeout_s=60) as client:
        answers = await asyncio.gather(
            *(client.ask(image, f"Question {number}?", max_output_tokens=4) for number in range(8))
        )
    receipts = [answer.receipts[0] for answer in answers]
    assert sum(receipt.cache_tier is CacheTier.NONE and not receipt.coalesced for receipt in receipts) == 1


def test_the_second_turn_hits_the_cache_without_an_encode(client: Client) -> None:
    conversation = client.create_conversation()
    first = conversation.ask(drawn(33), "What is this?", max_output_tokens=8)
    second = conversation.ask("And now?", max_output_tokens=8)
    assert (first.receipts[0].cache_hit, first.receipts[0].encode_s > 0) == (False, True)
    assert (second.receipts[0].cache_hit, second.receipts[0].encode_s) == (True, 0)
    assert second.receipts[0].media_digest == first.receipts[0].media_digest
    assert [message.role.value for message in conversation.messages()] == ["USER", "ASSISTANT"] * 2
    assert conversation.info().num_messages == 4


def test_a_large_picture_is_uploaded_and_asked_about_by_digest(client: Client) -> None:
    stream = io.BytesIO()
    Picture.effect_noise((900, 700), 90).save(stream, "PNG")
    image = Image.from_bytes(stream.getvalue(), max_tiles=2)
    assert len(stream.getvalue()) > 256 << 10
    first = client.ask(image, "What is this?", max_output_tokens=8, return_token_ids=True)
    again = client.ask(
        Image.from_digest(image.digest, max_tiles=2), "What is this?", max_output_tokens=8, return_token_ids=True
    )
    assert (again.token_ids, again.receipts[0].cache_hit) == (first.token_ids, True)


def test_a_deleted_conversation_is_gone(client: Client) -> None:
    conversation = client.create_conversation(system_message="Be brief.")
    assert conversation.info().system_message == "Be brief."
    conversation.delete()
    with pytest.raises(NotFoundError) as caught:
        conversation.ask("Hello")
    assert caught.value.reason == "CONVERSATION_NOT_FOUND"


def test_stop_sequences_and_limits_say_why_they_ended(client: Client) -> None:
    text = client.ask("Hello, who are you?", max_output_tokens=16).text
    assert client.ask("Hello, who are you?", max_output_tokens=2).finish_reason is FinishReason.LENGTH
    stopped = client.ask("Hello, who are you?", max_output_tokens=16, stop_sequences=(text[4:8],))
    assert (stopped.finish_reason, stopped.text) == (FinishReason.STOP, text[: text.index(text[4:8])])


def huge_png() -> bytes:
    """The beginning of a picture of 30,000 by 30,000 pixels: enough to see its size."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


BAD_PICTURES = {
    "no picture": (b"This is no picture at all.", "MEDIA_UNREADABLE"),
    "empty": (b"", "MEDIA_UNREADABLE"),
    "cut short": (PICTURE.read_bytes()[:4000], "MEDIA_UNREADABLE"),
    "damaged": (PICTURE.read_bytes()[:60] + os.urandom(500) + PICTURE.read_bytes()[560:], "MEDIA_UNREADABLE"),
    "too many pixels": (huge_png(), "MEDIA_TOO_LARGE"),
}
BAD_CONFIGS = {
    "negative temperature": GenerationConfig(temperature=-1.0),
    "temperature not a number": GenerationConfig(temperature=float("nan")),
    "infinite temperature": GenerationConfig(temperature=float("inf")),
    "negative top_p": GenerationConfig(top_p=-0.1),
    "top_p above one": GenerationConfig(top_p=1.5),
    "top_p not a number": GenerationConfig(top_p=float("nan")),
    "negative top_k": GenerationConfig(top_k=-1),
    "negative min_p": GenerationConfig(min_p=-0.5),
    "negative repetition penalty": GenerationConfig(repetition_penalty=-1.0),
    "zero repetition penalty": GenerationConfig(repetition_penalty=0.0),
    "no output": GenerationConfig(max_output_tokens=0),
    "no beams": GenerationConfig(num_beams=0),
    "ten thousand stop strings": GenerationConfig(stop_sequences=tuple(str(number) for number in range(10_000))),
    "empty stop string": GenerationConfig(stop_sequences=("",)),
    "endless stop string": GenerationConfig(stop_sequences=("x" * 1000,)),
}


@pytest.mark.parametrize("what", BAD_PICTURES)
def test_a_bad_picture_is_an_error_that_says_so(client: Client, what: str) -> None:
    content, reason = BAD_PICTURES[what]
    with pytest.raises(InvalidRequestError) as caught:
        client.ask(Image.from_bytes(content), "What is this?")
    assert caught.value.reason == reason
    assert_serving(client)


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_a_bad_setting_is_an_error_that_says_so(client: Client, what: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.ask("Hello", config=BAD_CONFIGS[what])
    assert caught.value.reason == "INVALID_GENERATION_CONFIG"
    assert caught.value.field is not None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "EMPTY_MESSAGE"),
        ([""], "EMPTY_MESSAGE"),
        (["a b " * 40_000], "PROMPT_TOO_LONG"),
        ([Image.from_digest("0" * 64), "What?"], "MEDIA_NOT_FOUND"),
        ([Image.from_digest("no digest"), "What?"], "INVALID_REQUEST"),
        ([Message.user("Hello"), Message.assistant("Hello.")], "INVALID_REQUEST"),
        ([Image.open(PICTURE, max_tiles=0), "What?"], "INVALID_REQUEST"),
        ([Image.open(PICTURE, max_tiles=100_000), "What?"], "INVALID_REQUEST"),
    ],
)
def test_a_bad_request_is_an_error_that_says_so(
    client: Client, content: list[str | Image | Message], reason: str
) -> None:
    with pytest.raises(InternVLError) as caught:
        client.ask(*content)
    assert caught.value.reason == reason
    assert_serving(client)


def test_an_unknown_conversation_is_an_error_that_says_so(client: Client) -> None:
    with pytest.raises(NotFoundError) as caught:
        client.conversation("nobody-knows-this").ask("Hello")
    assert caught.value.reason == "CONVERSATION_NOT_FOUND"


def test_bytes_under_a_false_digest_are_refused(client: Client) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.upload(Image("0" * 64, b"other bytes"))
    assert caught.value.reason == "MEDIA_DIGEST_MISMATCH"
    assert client.find_missing(["0" * 64]) == ["0" * 64]


def test_a_bad_turn_leaves_the_conversation_as_it_was(client: Client) -> None:
    conversation = client.create_conversation()
    conversation.ask("Hello", max_output_tokens=4)
    with pytest.raises(InvalidRequestError):
        conversation.ask(Image.from_bytes(b"no picture"), "What?")
    assert conversation.info().num_messages == 2
    assert conversation.ask("Still there?", max_output_tokens=4).usage.num_output_tokens > 0


def assert_serving(client: Client) -> None:
    answer = client.ask(
        golden_image("rgb_landscape.png", 4), "\nPlease describe the image shortly.", return_token_ids=True
    )
    assert answer.token_ids == (466, 466, 466, 482)


@pytest.mark.parametrize("program", ["quickstart.py", "async_client.py", "conversation.py"])
def test_the_examples_run(stack: LocalStack, program: str) -> None:
    ended = subprocess.run(
        [sys.executable, EXAMPLES / program, stack.address, PICTURE], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout
