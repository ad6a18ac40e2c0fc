"""The gateway's gRPC surface: one servicer per service, each call parsed, made and rendered."""

from gateway.servicers.batch import BatchServicer
from gateway.servicers.chat import ChatServicer
from gateway.servicers.conversation import ConversationServicer
from gateway.servicers.media import MediaServicer
from gateway.servicers.system import SystemServicer

__all__ = ["BatchServicer", "ChatServicer", "ConversationServicer", "MediaServicer", "SystemServicer"]
