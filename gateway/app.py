"""Puts the gateway together and opens what has to be closed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import structlog

from gateway.batch_messages import MessageFormat
from gateway.batch_store import BatchStore
from gateway.batches import Batches
from gateway.catalogue import Catalogue
from gateway.chat import Chat
from gateway.clients import LlmClient, VisionClient
from gateway.conversations import ConversationStore
from gateway.critic import StepCritic
from gateway.encoder import MediaEncoder
from gateway.media import DELETED_CHANNEL, LocalMediaCache, MediaLibrary, RedisMediaStore
from gateway.metrics import GatewayMetrics
from gateway.ranking import Ranking
from gateway.servicers import BatchServicer, ChatServicer, ConversationServicer, MediaServicer
from gateway.settings import GatewaySettings
from internvl_serving.gateway.v1 import (
    batch_service_pb2_grpc,
    chat_service_pb2_grpc,
    conversation_service_pb2_grpc,
    media_service_pb2_grpc,
)
from shared.announcements import Announcements
from shared.metrics import NO_METRICS, Registry
from shared.redis_link import connect_redis
from shared.rpc.channel import open_channel
from shared.rpc.server import Application
from shared.tasks import cancelled

log = structlog.get_logger()
_NAMES = ("ChatService", "ConversationService", "MediaService", "BatchService")
SERVICES = tuple(f"internvl_serving.gateway.v1.{name}" for name in _NAMES)
_PROGRESS_EVERY_S = 5.0
_ENVELOPE_BYTES = 1024  # of a message beside what it carries; far more than it takes


@asynccontextmanager
async def lifespan(
    settings: GatewaySettings, address: str, registry: Registry = NO_METRICS
) -> AsyncIterator[Application]:
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
        announcements = Announcements(
            redis, {DELETED_CHANNEL: lambda digest: library.forget(digest.decode())}, library.forget_all
        )
        stack.push_async_callback(cancelled, asyncio.create_task(announcements.run()))
        encoder = _encoder(vision, library, settings)
        catalogue = Catalogue(
            VisionClient(vision),
            encoder,
            library,
            settings.limits,
            parallel=settings.max_parallel_encodes,
            max_sent_bytes=settings.max_message_bytes - _ENVELOPE_BYTES,
        )
        ranking = Ranking(await _critic(settings, library, stack))
        metrics = GatewayMetrics.declared(registry)
        chat = Chat(LlmClient(llm), encoder, library, conversations, settings.limits, ranking, metrics)
        store = BatchStore(redis, settings.batch_lease_s)
        item_format = MessageFormat(settings.max_message_bytes - _ENVELOPE_BYTES)
        batches = Batches(chat, library, store, item_format, settings.batch_limits)
        stack.push_async_callback(batches.close)

        def register(server: grpc.aio.Server) -> None:
            chat_service_pb2_grpc.add_ChatServiceServicer_to_server(ChatServicer(chat), server)
            conversation_service_pb2_grpc.add_ConversationServiceServicer_to_server(
                ConversationServicer(conversations), server
            )
            media_service_pb2_grpc.add_MediaServiceServicer_to_server(MediaServicer(library, catalogue), server)
            batch_service_pb2_grpc.add_BatchServiceServicer_to_server(
                BatchServicer(batches, settings.max_media_bytes), server
            )

        async def warm_up() -> None:
            vision.get_state(try_to_connect=True)  # so that the first picture does not wait for the connection
            await _until_ready(llm, settings.llm_target)

        yield Application(register, SERVICES, warm_up)


async def _critic(settings: GatewaySettings, library: MediaLibrary, stack: AsyncExitStack) -> StepCritic | None:
    """Return the critic, if there is one; it is not waited for."""
    if not settings.critic_llm_target:
        return None
    targets = (settings.critic_vision_target, settings.critic_llm_target)
    vision, llm = [
        await stack.enter_async_context(open_channel(target, settings.max_message_bytes)) for target in targets
    ]
    encoder = _encoder(vision, library, settings)
    return StepCritic(LlmClient(llm), encoder)


def _encoder(vision: grpc.aio.Channel, library: MediaLibrary, settings: GatewaySettings) -> MediaEncoder:
    return MediaEncoder(VisionClient(vision), library, settings.max_parallel_encodes, settings.encode_patience_s)


async def _until_ready(channel: grpc.aio.Channel, target: str) -> None:
    """Wait until a replica behind the channel says that it serves, with an event now and then."""
    ready = asyncio.create_task(channel.channel_ready())
    try:
        while not (await asyncio.wait({ready}, timeout=_PROGRESS_EVERY_S))[0]:
            log.info("waiting_for_llm", target=target)
        await ready
    finally:
        ready.cancel()
