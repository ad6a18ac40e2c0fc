"""The typed client of internvl-serving, blocking and asyncio.

Example:
    with Client("127.0.0.1:50051") as client:
        print(client.ask(Image.open("cat.jpg"), "What is this?", max_output_tokens=64))

"""

from internvl_client.access import TlsFiles
from internvl_client.async_batches import AsyncBatch
from internvl_client.async_client import AsyncAnswerStream, AsyncClient, AsyncConversation, AsyncEventStream
from internvl_client.batches import Batch
from internvl_client.card import batch_from_card, messages_from_card, parts_from_card
from internvl_client.client import AnswerStream, Client, Conversation, EventStream
from internvl_client.content import Image, ImageGroup, Media, Message, Part, Role, Tool, ToolCall, Video
from internvl_client.errors import (
    ConversationBusyError,
    DeadlineError,
    InternVLError,
    InvalidRequestError,
    NotFoundError,
    NotPermittedError,
    OverloadedError,
    PreconditionError,
    ServerError,
    UnauthenticatedError,
    UnavailableError,
)
from internvl_client.grounding import Box, draw_boxes, parse_boxes
from internvl_client.system import ModelStatus, ServiceStatus, StageState, StageStatus, StoreStatus, SystemStatus
from internvl_client.types import (
    Answer,
    BatchInfo,
    BatchState,
    CacheTier,
    Candidate,
    ChatEvent,
    ContextOverflow,
    ConversationInfo,
    Delta,
    Estimate,
    Finished,
    FinishReason,
    GenerationConfig,
    Question,
    RankingMethod,
    Receipt,
    Started,
    Timings,
    TokenLogprob,
    UploadedMedia,
    Usage,
    VideoFrame,
)

__all__ = [
    "Answer",
    "AnswerStream",
    "AsyncAnswerStream",
    "AsyncBatch",
    "AsyncClient",
    "AsyncConversation",
    "AsyncEventStream",
    "Batch",
    "BatchInfo",
    "BatchState",
    "Box",
    "CacheTier",
    "Candidate",
    "ChatEvent",
    "Client",
    "ContextOverflow",
    "Conversation",
    "ConversationBusyError",
    "ConversationInfo",
    "DeadlineError",
    "Delta",
    "Estimate",
    "EventStream",
    "FinishReason",
    "Finished",
    "GenerationConfig",
    "Image",
    "ImageGroup",
    "InternVLError",
    "InvalidRequestError",
    "Media",
    "Message",
    "ModelStatus",
    "NotFoundError",
    "NotPermittedError",
    "OverloadedError",
    "Part",
    "PreconditionError",
    "Question",
    "RankingMethod",
    "Receipt",
    "Role",
    "ServerError",
    "ServiceStatus",
    "StageState",
    "StageStatus",
    "Started",
    "StoreStatus",
    "SystemStatus",
    "Timings",
    "TlsFiles",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "UnauthenticatedError",
    "UnavailableError",
    "UploadedMedia",
    "Usage",
    "Video",
    "VideoFrame",
    "batch_from_card",
    "draw_boxes",
    "messages_from_card",
    "parse_boxes",
    "parts_from_card",
]
