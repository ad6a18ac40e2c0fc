"""Puts the gateway together and opens what has to be closed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import structlog

from gateway.chat import Chat
from gateway.clients import LlmClient, VisionClient
from gateway.conversations import ConversationStore
from gateway.encoder import MediaEncoder
from gateway.media import LocalMediaCache, MediaLibrary, RedisMediaStore
from gateway.servicers import ChatServicer, ConversationServicer, MediaServicer
from gateway.settings import GatewaySettings
from internvl_serving.gateway.v1 import (
    chat_service_pb2_grpc,
    conversation_service_pb2_grpc,
    media_service_pb2_grpc,
)
from shared.rpc.channel import open_channel
from shared.rpc.server import Application
from shared.store import connect_redis

log = structlog.get_logger()
SERVICES = tuple(
    f"internvl_serving.gateway.v1.{name}" for name in ("ChatService", "ConversationService", "MediaService")
)
_PROGRESS_EVERY_S = 5.0


@asynccontextmanager
async def lifespan(settings: GatewaySettings, address: str) -> AsyncIterator[Application]:
    """Yield the gateway. It is ready once an LLM replica is, and stays so; neither vision nor Redis is waited for."""
    async with AsyncExitStack() as stack:
        vision = await stack.enter_async_context(open_channel(settings.vision_target, settings.max_message_bytes))
        llm = await stack.enter_async_context(open_channel(settings.llm_target, settings.max_message_bytes))
        redis = connect_redis(settings.redis_url, settings.redis_timeout_s)
        stack.push_async_callback(redis.aclose)

        conversations = ConversationStore(
            redis, settings.conversation_ttl_s, settings.conversation_lease_s, settings.max_text_chars
        )
        library = MediaLibrary(
            RedisMediaStore(redis, settings.media_ttl_s),
            LocalMediaCache(settings.media_cache_bytes),
            settings.max_media_bytes,
        )
        encoder = MediaEncoder(VisionClient(vision), library, settings.max_parallel_encodes)
        chat = Chat(LlmClient(llm), encoder, library, conversations, settings.limits)

        def register(server: grpc.aio.Server) -> None:
            chat_service_pb2_grpc.add_ChatServiceServicer_to_server(ChatServicer(chat), server)
            conversation_service_pb2_grpc.add_ConversationServiceServicer_to_server(
                ConversationServicer(conversations), server
            )
            media_service_pb2_grpc.add_MediaServiceServicer_to_server(MediaServicer(library), server)

        async def warm_up() -> None:
            vision.get_state(try_to_connect=True)  # so that the first picture does not wait for the connection
            await _until_ready(llm, settings.llm_target)

        yield Application(register, SERVICES, warm_up)


async def _until_ready(channel: grpc.aio.Channel, target: str) -> None:
    """Wait until a replica behind the channel says that it serves, with an event now and then."""
    ready = asyncio.create_task(channel.channel_ready())
    try:
        while not (await asyncio.wait({ready}, timeout=_PROGRESS_EVERY_S))[0]:
            log.info("waiting_for_llm", target=target)
        await ready
    finally:
        ready.cancel()
