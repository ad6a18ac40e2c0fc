"""The typed client of internvl-serving, blocking and asyncio.

Example:
    with Client("127.0.0.1:50051") as client:
        print(client.ask(Image.open("cat.jpg"), "What is this?", max_output_tokens=64))

"""

from internvl_client.async_client import AsyncAnswerStream, AsyncClient, AsyncConversation, AsyncEventStream
from internvl_client.card import messages_from_card, parts_from_card
from internvl_client.client import AnswerStream, Client, Conversation, EventStream
from internvl_client.errors import (
    ConversationBusyError,
    DeadlineError,
    InternVLError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PreconditionError,
    ServerError,
    UnavailableError,
)
from internvl_client.types import (
    Answer,
    CacheTier,
    ChatEvent,
    ConversationInfo,
    Delta,
    Finished,
    FinishReason,
    GenerationConfig,
    Image,
    ImageGroup,
    Message,
    Part,
    Receipt,
    Role,
    Started,
    Timings,
    UploadedMedia,
    Usage,
)

__all__ = [
    "Answer",
    "AnswerStream",
    "AsyncAnswerStream",
    "AsyncClient",
    "AsyncConversation",
    "AsyncEventStream",
    "CacheTier",
    "ChatEvent",
    "Client",
    "Conversation",
    "ConversationBusyError",
    "ConversationInfo",
    "DeadlineError",
    "Delta",
    "EventStream",
    "FinishReason",
    "Finished",
    "GenerationConfig",
    "Image",
    "ImageGroup",
    "InternVLError",
    "InvalidRequestError",
    "Message",
    "NotFoundError",
    "OverloadedError",
    "Part",
    "PreconditionError",
    "Receipt",
    "Role",
    "ServerError",
    "Started",
    "Timings",
    "UnavailableError",
    "UploadedMedia",
    "Usage",
    "messages_from_card",
    "parts_from_card",
]
