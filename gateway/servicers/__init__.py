"""The gateway's gRPC surface: one servicer per service, each call parsed, made and rendered."""

from gateway.servicers.chat import ChatServicer
from gateway.servicers.conversation import ConversationServicer
from gateway.servicers.media import MediaServicer

__all__ = ["ChatServicer", "ConversationServicer", "MediaServicer"]
