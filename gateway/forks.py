"""Conversations that begin with what was said in another."""

from collections.abc import Sequence

from gateway.content import Message, Role
from gateway.conversations import Conversation, ConversationStore
from gateway.media import MediaLibrary
from shared.errors import InvalidRequest, MessageNotFound


class Forks:
    """Forks kept conversations. Safe to share between tasks."""

    def __init__(self, conversations: ConversationStore, library: MediaLibrary) -> None:
        self._conversations = conversations
        self._library = library

    async def fork(self, conversation_id: str, message_id: str, ttl_s: int | None) -> Conversation:
        """Begin a conversation with the messages of another up to an answer, by its id; empty: to the last one.

        It is kept for `ttl_s` after its last turn; None: as long as the other. A turn that is running there is no part
        of it. Raises `ConversationNotFound`, `MessageNotFound`, `InvalidRequest`, `StoreUnavailable`.
        """
        past = await self._conversations.read(conversation_id)
        messages = _up_to(past.messages, message_id)
        kept_s = past.ttl_s if ttl_s is None else ttl_s
        # The bytes go first: a conversation must not name a picture that its turns cannot find.
        await self._library.keep([medium for message in messages for medium in message.media], kept_s)
        return await self._conversations.create(past.system_message, kept_s, messages)


def _up_to(messages: Sequence[Message], message_id: str) -> tuple[Message, ...]:
    if not message_id:
        return tuple(messages)
    for index, message in enumerate(messages):
        if message.message_id == message_id:
            if message.role is not Role.ASSISTANT:
                raise InvalidRequest("A fork ends with an answer.", field="message_id")
            return tuple(messages[: index + 1])
    raise MessageNotFound("The conversation has no such message.", resource=message_id)
