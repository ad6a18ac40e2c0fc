"""A server with OpenAI's API as a target: chat completions, streamed."""

import base64
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from benchmarks.peers.sse import END, EventLines
from internvl_client.bench import Exchange, Question, Stopwatch, TargetError
from internvl_client.bench.target import OnText

_TIMEOUT: Final = aiohttp.ClientTimeout(total=3600)
_SHOWN_CHARACTERS: Final = 300  # of an error's body


@dataclass(frozen=True, slots=True)
class Chunk:
    """What an event of a stream says: more text, and at the end the tokens that were counted.

    Text may be empty where a token has come and no whole character: None is what no token came with.
    """

    text: str | None
    num_output_tokens: int | None = None
    num_prompt_tokens: int | None = None
    num_cached_tokens: int | None = None


def parse_chunk(data: str) -> Chunk:
    """Read an event's data; raise `TargetError` for an error, or for what is no chunk of a chat completion."""
    try:
        content = json.loads(data)
        if content.get("error"):
            raise TargetError(f"the server ended the answer: {str(content['error'])[:_SHOWN_CHARACTERS]}")
        choices = content.get("choices") or [{}]
        delta = choices[0].get("delta") or {}
        # The first event opens the answer, with a role and an empty text, before there is a token.
        text = None if "role" in delta and not delta.get("content") else delta.get("content")
        usage = content.get("usage") or {}
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        return Chunk(text, usage.get("completion_tokens"), usage.get("prompt_tokens"), cached)
    except (ValueError, AttributeError, LookupError, TypeError):
        raise TargetError(f"the server sent no chunk of a chat completion: {data[:_SHOWN_CHARACTERS]}") from None


def message_of(question: Question) -> dict[str, Any]:
    """Return a question as a message of the user, its pictures as data URLs."""
    if not question.pictures:
        return {"role": "user", "content": question.text}
    pictures = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(picture).decode()}"}}
        for picture in question.pictures
    ]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": question.text}]}


class OpenAiTarget:
    """Asks a server at `url` for the model called `model`; `length` names the fields that force an answer's length.

    Those get the number of tokens, or True for what is a switch: `{"min_tokens": int, "ignore_eos": bool}`.
    """

    def __init__(
        self, session: aiohttp.ClientSession, url: str, name: str, model: str, length: Mapping[str, type] | None = None
    ) -> None:
        self.name = name
        self._session = session
        self._url = f"{url}/v1/chat/completions"
        self._model = model
        self._length = length or {}

    @asynccontextmanager
    async def dialogue(self, num_turns: int) -> AsyncIterator["_OpenAiDialogue"]:
        """Begin a dialogue; every question carries all of it, as the API has it."""
        yield _OpenAiDialogue(self)

    async def complete(self, messages: list[dict[str, Any]], num_output_tokens: int) -> AsyncIterator[Chunk]:
        """Yield the answer's chunks; raise `TargetError`."""
        forced = {name: True if kind is bool else num_output_tokens for name, kind in self._length.items()}
        body = {
            "model": self._model,
            "messages": messages,
            "max_tokens": num_output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **forced,
        }
        lines = EventLines()
        try:
            async with self._session.post(self._url, json=body) as response:
                if response.status != 200:
                    text = (await response.text())[:_SHOWN_CHARACTERS]
                    raise TargetError(f"{self.name} answered {response.status}: {text}")
                async for content in response.content.iter_any():
                    for data in lines.feed(content):
                        if data == END:
                            return
                        yield parse_chunk(data)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise TargetError(f"the connection to {self.name} failed: {type(error).__name__}") from None


class _OpenAiDialogue:
    """A dialogue that is kept here, because the server keeps none."""

    def __init__(self, target: OpenAiTarget) -> None:
        self._target = target
        self._messages: list[dict[str, Any]] = []

    async def ask(self, question: Question, num_output_tokens: int, on_text: OnText = lambda: None) -> Exchange:
        self._messages.append(message_of(question))
        texts: list[str] = []
        counted = Chunk(None)
        watch = Stopwatch()
        async for chunk in self._target.complete(self._messages, num_output_tokens):
            if chunk.text is not None:
                watch.note_piece()
                on_text()
                texts.append(chunk.text)
            if chunk.num_output_tokens is not None:
                counted = chunk
        self._messages.append({"role": "assistant", "content": "".join(texts)})
        return watch.finished(counted.num_output_tokens, counted.num_prompt_tokens, counted.num_cached_tokens)


@asynccontextmanager
async def connected(
    url: str, name: str, model: str, length: Mapping[str, type] | None = None
) -> AsyncIterator[OpenAiTarget]:
    """Yield a target; every question has a connection of its own, as those of different users have."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT, read_bufsize=1 << 20) as session:
        yield OpenAiTarget(session, url, name, model, length)
