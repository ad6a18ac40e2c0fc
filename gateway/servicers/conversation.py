"""`ConversationService`."""

from typing import Any

from gateway import convert
from gateway.conversations import ConversationStore
from gateway.forks import Forks
from internvl_serving.gateway.v1 import conversation_service_pb2 as messages
from internvl_serving.gateway.v1 import conversation_service_pb2_grpc


class ConversationServicer(conversation_service_pb2_grpc.ConversationServiceServicer):
    """Keeps dialogues."""

    def __init__(self, conversations: ConversationStore, forks: Forks) -> None:
        self._conversations = conversations
        self._forks = forks

    async def CreateConversation(
        self, request: messages.CreateConversationRequest, context: Any
    ) -> messages.CreateConversationResponse:
        """Begin a conversation."""
        system_message, ttl_s = convert.new_conversation(request)
        created = await self._conversations.create(system_message, ttl_s)
        return messages.CreateConversationResponse(conversation=convert.conversation(created))

    async def GetConversation(
        self, request: messages.GetConversationRequest, context: Any
    ) -> messages.GetConversationResponse:
        """Return a conversation without its messages."""
        found = await self._conversations.get(request.conversation_id)
        return messages.GetConversationResponse(conversation=convert.conversation(found))

    async def ListConversations(
        self, request: messages.ListConversationsRequest, context: Any
    ) -> messages.ListConversationsResponse:
        """Return a page of conversations."""
        page = await self._conversations.list_conversations(request.page_size, request.page_token)
        return convert.list_conversations_response(page)

    async def ListMessages(self, request: messages.ListMessagesRequest, context: Any) -> messages.ListMessagesResponse:
        """Return a page of messages."""
        page = await self._conversations.list_messages(request.conversation_id, request.page_size, request.page_token)
        return convert.list_messages_response(page)

    async def ForkConversation(
        self, request: messages.ForkConversationRequest, context: Any
    ) -> messages.ForkConversationResponse:
        """Begin a conversation with the messages of another."""
        forked = await self._forks.fork(request.conversation_id, request.message_id, convert.fork_ttl_s(request))
        return messages.ForkConversationResponse(conversation=convert.conversation(forked))

    async def DeleteConversation(
        self, request: messages.DeleteConversationRequest, context: Any
    ) -> messages.DeleteConversationResponse:
        """Forget a conversation."""
        await self._conversations.delete(request.conversation_id)
        return messages.DeleteConversationResponse()
