"""A gateway as a target: asked as its users ask it, with the asyncio client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

from internvl_client.async_client import AsyncAnswerStream, AsyncClient, AsyncConversation
from internvl_client.bench.exchange import Exchange, Stopwatch
from internvl_client.bench.questions import Question
from internvl_client.bench.target import OnText, TargetError
from internvl_client.content import Image, Part
from internvl_client.errors import InternVLError

OURS: Final = "internvl-serving"


class GatewayTarget:
    """Asks through `client`. A dialogue of several turns is a conversation that the server keeps.

    `system_message` None is the model's own; "" is none, for prompts as long as those of servers that have none.
    """

    def __init__(self, client: AsyncClient, name: str = OURS, system_message: str | None = None) -> None:
        self.name = name
        self._client = client
        self._system_message = system_message

    @asynccontextmanager
    async def dialogue(self, num_turns: int) -> AsyncIterator[_GatewayDialogue]:
        """Begin a dialogue; what the server keeps of it is removed at the end."""
        if num_turns == 1:
            yield _GatewayDialogue(partial(self._client.stream, system_message=self._system_message))
            return
        try:
            conversation = await self._client.create_conversation(system_message=self._system_message)
        except InternVLError as error:
            raise TargetError(f"{error.message} [{error.reason or error.code.name}]") from None
        try:
            yield _GatewayDialogue(conversation.stream)
        finally:
            await _forget(conversation)


async def _forget(conversation: AsyncConversation) -> None:
    try:
        await conversation.delete()
    except InternVLError:
        return  # it expires by itself


class _GatewayDialogue:
    """One dialogue, kept by the server or of one question; `stream` is how it is asked."""

    def __init__(self, stream: Callable[..., AsyncAnswerStream]) -> None:
        self._stream = stream

    async def ask(self, question: Question, num_output_tokens: int, on_text: OnText = lambda: None) -> Exchange:
        parts: list[Part] = [*map(Image.from_bytes, question.pictures), question.text]
        watch = Stopwatch()
        try:
            async with self._stream(*parts, max_output_tokens=num_output_tokens, ignore_end=True) as stream:
                return await _watched(stream, watch, on_text)
        except InternVLError as error:
            raise TargetError(f"{error.message} [{error.reason or error.code.name}]") from None


async def _watched(stream: AsyncAnswerStream, watch: Stopwatch, on_text: OnText) -> Exchange:
    async for _ in stream:
        watch.note_piece()
        on_text()
    usage = (await stream.answer()).usage
    return watch.finished(usage.num_output_tokens, usage.num_prompt_tokens, usage.num_cached_tokens)
