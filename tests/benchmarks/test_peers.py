"""Other systems under measurement: what they say over HTTP, and what is done to their packages."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from benchmarks.peers.openai_target import Chunk, connected, message_of, parse_chunk
from benchmarks.peers.peer import PeerError
from benchmarks.peers.sse import END, EventLines
from benchmarks.peers.torchvision_patch import patch_torchvision
from internvl_client.bench import Question, TargetError

EVENTS = b'data: {"a": 1}\n\n: a comment\nevent: x\ndata:{"b": 2}\r\n\ndata: [DONE]\n\n'
USAGE = {"prompt_tokens": 20, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 16}}


@pytest.mark.parametrize("size", [1, 2, 7, len(EVENTS)])
def test_events_are_whole_whatever_pieces_they_come_in(size: int) -> None:
    lines = EventLines()
    pieces = [EVENTS[start : start + size] for start in range(0, len(EVENTS), size)]
    assert [data for piece in pieces for data in lines.feed(piece)] == ['{"a": 1}', '{"b": 2}', END]


def test_an_event_that_is_not_complete_is_not_given() -> None:
    assert list(EventLines().feed(b'data: {"a": 1}')) == []


@pytest.mark.parametrize(
    ("event", "chunk"),
    [
        ({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, Chunk(None)),
        ({"choices": [{"delta": {"content": ""}}]}, Chunk("")),
        ({"choices": [{"delta": {"content": "cat"}}], "usage": None}, Chunk("cat")),
        ({"choices": [], "usage": USAGE}, Chunk(None, 4, 20, 16)),
        ({"choices": [{"delta": None}], "usage": {"completion_tokens": 4}}, Chunk(None, 4)),
    ],
)
def test_chunks_say_text_and_counted_tokens(event: dict[str, Any], chunk: Chunk) -> None:
    assert parse_chunk(json.dumps(event)) == chunk


@pytest.mark.parametrize("data", ["", "nonsense", "[]", '{"error": {"message": "no room"}}'])
def test_what_is_no_chunk_is_no_answer(data: str) -> None:
    with pytest.raises(TargetError, match=r"no chunk|no room"):
        parse_chunk(data)


def test_pictures_come_before_the_text_of_their_question() -> None:
    picture, text = message_of(Question("What?", (b"\x89PNG",)))["content"]
    assert picture["image_url"]["url"] == "data:image/png;base64,iVBORw=="
    assert text == {"type": "text", "text": "What?"}


class FakeServer:
    """Streams `events` as they are written, with a status; keeps the bodies that it was asked with."""

    def __init__(self, events: Sequence[str], status: int = 200) -> None:
        self.bodies: list[dict[str, Any]] = []
        self._events = events
        self._status = status

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        if self._status != 200:
            return web.Response(status=self._status, text="no such field")
        response = web.StreamResponse()
        await response.prepare(request)
        for event in self._events:
            await response.write(f"data: {event}\n\n".encode())
        return response


@asynccontextmanager
async def serving(server: FakeServer) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", server.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def text_event(text: str) -> str:
    return json.dumps({"choices": [{"delta": {"content": text}}]})


async def test_a_dialogue_carries_all_of_itself_and_forces_its_length() -> None:
    server = FakeServer([text_event("a "), text_event("cat"), json.dumps({"usage": USAGE}), END])
    length = {"min_tokens": int, "ignore_eos": bool}
    async with serving(server) as url, connected(url, "peer", "m", length) as target, target.dialogue(2) as dialogue:
        first = await dialogue.ask(Question("What?", (b"picture",)), 4)
        await dialogue.ask(Question("And?"), 4)
    assert (len(first.piece_times_s), first.num_output_tokens, first.num_cached_tokens) == (2, 4, 16)
    one, two = server.bodies
    assert (one["max_tokens"], one["min_tokens"], one["ignore_eos"], one["stream"]) == (4, 4, True, True)
    assert [message["role"] for message in two["messages"]] == ["user", "assistant", "user"]
    assert two["messages"][0] == one["messages"][0]
    assert two["messages"][1]["content"] == "a cat"


async def test_tokens_that_nobody_counted_are_the_pieces() -> None:
    server = FakeServer([text_event("a"), text_event("b"), END])
    async with serving(server) as url, connected(url, "peer", "m") as target, target.dialogue(1) as dialogue:
        assert (await dialogue.ask(Question("What?"), 2)).num_output_tokens == 2


async def test_what_a_server_refuses_says_why() -> None:
    server = FakeServer([], 422)
    async with serving(server) as url, connected(url, "peer", "m") as target, target.dialogue(1) as dialogue:
        with pytest.raises(TargetError, match="peer answered 422: no such field"):
            await dialogue.ask(Question("What?"), 2)


async def test_a_server_that_is_gone_is_no_crash() -> None:
    async with connected("http://127.0.0.1:1", "peer", "m") as target, target.dialogue(1) as dialogue:
        with pytest.raises(TargetError, match="the connection to peer failed"):
            await dialogue.ask(Question("What?"), 2)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder of packages with what the patch looks for."""
    (tmp_path / "torchvision" / "io").mkdir(parents=True)
    operators = 'import torch\n\n@torch.library.register_fake("torchvision::nms")\ndef meta_nms(): ...\n'
    (tmp_path / "torchvision" / "_meta_registrations.py").write_text(operators)
    (tmp_path / "torchvision" / "io" / "image.py").write_text("def _assert_has_image_ops(): ...\n")
    return tmp_path


def test_torchvision_is_patched_once(packages: Path) -> None:
    files = sorted((packages / "torchvision").rglob("*.py"))
    patch_torchvision(packages)
    once = [file.read_text() for file in files]
    patch_torchvision(packages)
    assert [file.read_text() for file in files] == once
    for text in once:
        compile(text, "patched", "exec")
    assert once[0].index('define("nms(') < once[0].index("register_fake")


def test_another_torchvision_is_left_alone(packages: Path) -> None:
    operators = packages / "torchvision" / "_meta_registrations.py"
    operators.write_text("import torch\n")
    with pytest.raises(PeerError, match="its form has changed"):
        patch_torchvision(packages)
    assert operators.read_text() == "import torch\n"
