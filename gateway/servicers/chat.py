"""`ChatService`."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from gateway import convert
from gateway.chat import Chat
from internvl_serving.gateway.v1 import chat_service_pb2, chat_service_pb2_grpc


class ChatServicer(chat_service_pb2_grpc.ChatServiceServicer):
    """Answers questions about pictures."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat

    async def Chat(
        self, request: chat_service_pb2.ChatRequest, context: Any
    ) -> AsyncGenerator[chat_service_pb2.ChatResponse, None]:
        """Stream one answer."""
        async with aclosing(self._chat.answer(convert.chat_request(request))) as events:
            async for event in events:
                yield convert.chat_response(event)
