"""Puts the gateway together and opens what has to be closed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import grpc
import structlog

from gateway.admission import Admission
from gateway.auth import KeyGate
from gateway.batch_messages import MessageFormat
from gateway.batch_store import BatchStore
from gateway.batches import Batches
from gateway.budgets import Budgets
from gateway.catalogue import Catalogue
from gateway.chat import Chat
from gateway.clients import LlmClient, VisionClient
from gateway.conversations import ConversationStore
from gateway.critic import StepCritic
from gateway.encoder import MediaEncoder
from gateway.eviction import warn_of_eviction
from gateway.forks import Forks
from gateway.keys import KeyRing
from gateway.keys_file import FollowedKeys
from gateway.media import DELETED_CHANNEL, LocalMediaCache, MediaLibrary, RedisMediaStore
from gateway.metrics import AdmissionMetrics, GatewayMetrics
from gateway.ranking import Ranking
from gateway.remote import FetchMetrics, opened_remote_media
from gateway.routing import Fleet, FleetMetrics
from gateway.servicers import BatchServicer, ChatServicer, ConversationServicer, MediaServicer, SystemServicer
from gateway.settings import GatewaySettings
from gateway.stage_probe import probes_of
from gateway.stages import Stages
from gateway.system import System
from gateway.tokenizing import ModelDirectory, Tokenizing
from internvl_serving.gateway.v1 import (
    batch_service_pb2_grpc,
    chat_service_pb2_grpc,
    conversation_service_pb2_grpc,
    media_service_pb2_grpc,
    system_service_pb2_grpc,
)
from shared.announcements import Announcements
from shared.metrics import NO_METRICS, Registry
from shared.redis_link import connect_redis
from shared.rpc.server import Application, Edge
from shared.service_status import ProcessStatus, read_store
from shared.tasks import cancelled

log = structlog.get_logger()
_NAMES = ("ChatService", "ConversationService", "MediaService", "BatchService", "SystemService")
SERVICES = tuple(f"internvl_serving.gateway.v1.{name}" for name in _NAMES)
_PROGRESS_EVERY_S = 5.0
_ENVELOPE_BYTES = 1024  # of a message beside what it carries; far more than it takes


@asynccontextmanager
async def lifespan(
    settings: GatewaySettings, address: str, registry: Registry = NO_METRICS
) -> AsyncIterator[Application]:
    """Yield the gateway. It is ready once an LLM replica is, and stays so; neither vision nor Redis is waited for."""
    async with AsyncExitStack() as stack:
        keys = _keys(settings, stack)
        stages = Stages(settings, FleetMetrics.declared(registry), stack)
        vision = await stages.vision("vision", settings.vision_target)
        llm = await stages.llm("llm", settings.llm_target)
        redis = connect_redis(settings.redis_url, settings.redis_timeout_s)
        stack.push_async_callback(redis.aclose)
        stack.push_async_callback(cancelled, asyncio.create_task(warn_of_eviction(redis)))
        media_redis = redis
        if settings.media_redis_url:
            media_redis = connect_redis(settings.media_redis_url, settings.redis_timeout_s)
            stack.push_async_callback(media_redis.aclose)

        conversations = ConversationStore(
            redis,
            settings.conversation_ttl_s,
            settings.conversation_lease_s,
            settings.max_text_chars,
            lists_for_anybody=not settings.allow_anyone,
        )
        library = MediaLibrary(
            RedisMediaStore(media_redis, settings.media_ttl_s),
            LocalMediaCache(settings.media_cache_bytes),
            settings.max_media_bytes,
        )
        announcements = Announcements(media_redis, {DELETED_CHANNEL: library.hear_deleted}, library.forget_all)
        stack.push_async_callback(cancelled, asyncio.create_task(announcements.run()))
        encoder = _encoder(vision, library, settings)
        admission = Admission(settings.admission_limits, Budgets(keys.limits_of), AdmissionMetrics.declared(registry))
        catalogue = Catalogue(
            VisionClient(vision),
            encoder,
            library,
            settings.limits,
            parallel=settings.max_parallel_encodes,
            max_sent_bytes=settings.max_message_bytes - _ENVELOPE_BYTES,
            admission=admission,
        )
        ranking = Ranking(await _critic(settings, library, stages))
        metrics = GatewayMetrics.declared(registry)
        chat = Chat(LlmClient(llm), encoder, library, conversations, settings.limits, ranking, metrics, admission)
        store = BatchStore(redis, settings.batch_lease_s)
        item_format = MessageFormat(settings.max_message_bytes - _ENVELOPE_BYTES)
        batches = Batches(chat, library, store, item_format, settings.batch_limits)
        stack.push_async_callback(batches.close)

        probes = {str(stage): partial(probes_of, stage, fleet) for stage, fleet in stages.fleets.items()}
        media_store = partial(read_store, media_redis.info) if media_redis is not redis else None
        system = System(ProcessStatus(redis), probes, media_store)

        def register(server: grpc.aio.Server) -> None:
            chat_service_pb2_grpc.add_ChatServiceServicer_to_server(ChatServicer(chat), server)
            conversation_service_pb2_grpc.add_ConversationServiceServicer_to_server(
                ConversationServicer(conversations, Forks(conversations, library)), server
            )
            media_service_pb2_grpc.add_MediaServiceServicer_to_server(MediaServicer(library, catalogue), server)
            batch_service_pb2_grpc.add_BatchServiceServicer_to_server(
                BatchServicer(batches, settings.max_media_bytes), server
            )
            system_service_pb2_grpc.add_SystemServiceServicer_to_server(SystemServicer(system), server)

        async def warm_up() -> None:
            await _until_ready(llm, settings.llm_target)

        fetch_metrics = FetchMetrics.declared(registry)
        remote = stack.enter_context(opened_remote_media(settings.remote_hosts, settings.fetch_limits, fetch_metrics))
        gate = KeyGate(keys)
        edges: list[Edge] = []
        if settings.http_listen:
            # Only here: it brings a web framework with it.
            from gateway.http import Parts, http_edge
            from gateway.http.page import PAGE_PATHS, page_routes

            tokenizing = Tokenizing(LlmClient(llm), encoder, library, settings.limits, admission)
            parts = Parts(
                chat,
                library,
                ModelDirectory(LlmClient(llm)),
                tokenizing,
                gate=gate,
                needs_key=not keys.is_open,
                expose=registry.exposition,
                remote=remote,
                pages=page_routes(),
                page_paths=PAGE_PATHS,
            )
            edges.append(http_edge(settings, parts))
        yield Application(register, SERVICES, warm_up, gate=gate, edges=edges)


def _keys(settings: GatewaySettings, stack: AsyncExitStack) -> KeyRing:
    """Return who may call, kept as the keys file is while the gateway runs."""
    if settings.keys_file is None:
        if settings.allow_anyone:
            log.warning("anyone_may_call")
        return KeyRing()
    followed = FollowedKeys(settings.keys_file)
    stack.push_async_callback(cancelled, asyncio.create_task(followed.follow(settings.keys_poll_s)))
    return followed.ring


async def _critic(settings: GatewaySettings, library: MediaLibrary, stages: Stages) -> StepCritic | None:
    """Return the critic, if there is one; it is not waited for."""
    if not settings.critic_llm_target:
        return None
    vision = await stages.vision("critic_vision", settings.critic_vision_target)
    llm = await stages.llm("critic_llm", settings.critic_llm_target)
    encoder = _encoder(vision, library, settings)
    return StepCritic(LlmClient(llm), encoder)


def _encoder(vision: Fleet, library: MediaLibrary, settings: GatewaySettings) -> MediaEncoder:
    return MediaEncoder(VisionClient(vision), library, settings.max_parallel_encodes, settings.encode_patience_s)


async def _until_ready(llm: Fleet, target: str) -> None:
    """Wait until a replica says that it serves, with an event now and then."""
    ready = asyncio.create_task(llm.ready())
    try:
        while not (await asyncio.wait({ready}, timeout=_PROGRESS_EVERY_S))[0]:
            log.info("waiting_for_llm", target=target)
        await ready
    finally:
        ready.cancel()
