"""The bytes of media, each tenant's apart: in this process's memory, and in Redis for later turns and replicas."""

import asyncio
import hashlib
from collections.abc import AsyncIterable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Protocol, cast

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from redis.asyncio import Redis

from gateway.caller import current_caller
from gateway.content import MediaPart, Medium, Message, Part
from gateway.dialogue import Dialogue
from shared.breaker import CircuitBreaker
from shared.digest import digest_of
from shared.errors import MediaDigestMismatch, MediaNotFound, MediaTooLarge, MediaUnreadable, StoreUnavailable
from shared.lru import LruCache
from shared.reach import reaching_store

log = structlog.get_logger()
MAX_CHUNK_BYTES = 2 << 20  # larger values make Redis stall for everybody
DELETED_CHANNEL = "ivl:deleted-media"
_HASHED_ON_LOOP_BYTES = 1 << 20  # more would hold up every stream of the process


@dataclass(frozen=True, slots=True)
class StoredMedium:
    """A medium whose bytes are in the store until `expire_time`, or longer if it is used again."""

    digest: str
    size_bytes: int
    expire_time: datetime


class MediaStore(Protocol):
    """Keeps the bytes of the current caller's tenant by digest, shared by all replicas.

    Every method raises `StoreUnavailable`.
    """

    async def find_missing(self, digests: Sequence[str]) -> list[str]:
        """Return those of `digests` that are not held, in order; those that are stay for another TTL."""

    async def get(self, digest: str) -> bytes | None:
        """Return the verified bytes; None is a miss. What does not verify is forgotten."""

    async def put(self, digest: str, content: bytes, ttl_s: int | None = None) -> StoredMedium:
        """Store the bytes for at least `ttl_s`; None: as long as the store keeps media."""

    async def touch(self, digests: Collection[str], ttl_s: int | None = None) -> None:
        """Keep those of `digests` that are held for at least `ttl_s` more."""

    async def delete(self, digest: str) -> None:
        """Remove the bytes, and tell every process that holds them."""


class LocalMediaCache(LruCache[tuple[str, str], bytes]):
    """Bytes of media in this process's memory, by tenant and digest. One loop only."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes, len)


class _Manifest(BaseModel):
    """What is written beside the chunks of a medium."""

    model_config = ConfigDict(frozen=True)

    size_bytes: int = Field(ge=1)

    @property
    def chunk_count(self) -> int:
        """Number of stored chunks."""
        return -(-self.size_bytes // MAX_CHUNK_BYTES)


class RedisMediaStore:
    """Media in Redis: chunks of at most 2 MiB under `ivl:media:<digest>:<i>`, a manifest under `ivl:media:<digest>`.

    Those of a tenant begin with `ivl:tenant:<tenant>:` instead of `ivl:`.
    """

    def __init__(self, redis: Redis, ttl_s: int) -> None:
        self._redis = redis
        self._ttl_s = ttl_s

    async def find_missing(self, digests: Sequence[str]) -> list[str]:
        """Return those of `digests` that are not held, in order; those that are stay for another TTL."""
        held = await self._manifests(digests)
        await self._extend(held, self._ttl_s)
        return [digest for digest in digests if digest not in held]

    async def get(self, digest: str) -> bytes | None:
        """Return the verified bytes; None is a miss. What does not verify is forgotten."""
        manifest = (await self._manifests([digest])).get(digest)
        if manifest is None:
            return None
        content = await self._read(digest, manifest)
        if content is None or await hash_content(content) != digest:
            log.warning("stored_media_rejected", digest=digest)
            await self._forget(digest)
            return None
        await self._extend({digest: manifest}, self._ttl_s)
        return content

    async def put(self, digest: str, content: bytes, ttl_s: int | None = None) -> StoredMedium:
        """Store the chunks, then the manifest, so that a manifest never precedes what it lists."""
        keep_s = max(ttl_s or 0, self._ttl_s)
        manifest = _Manifest(size_bytes=len(content))
        # One call per chunk: the time limit of a call is for one answer, not for a whole medium.
        with reaching_store():
            for index, chunk in enumerate(_chunks(content)):
                await self._redis.set(_chunk_key(digest, index), chunk, ex=keep_s)
            await self._redis.set(_key(digest), manifest.model_dump_json(), ex=keep_s)
        return StoredMedium(digest, len(content), datetime.now(UTC) + timedelta(seconds=keep_s))

    async def touch(self, digests: Collection[str], ttl_s: int | None = None) -> None:
        """Keep those of `digests` that are held for at least `ttl_s` more."""
        await self._extend(await self._manifests(digests), max(ttl_s or 0, self._ttl_s))

    async def delete(self, digest: str) -> None:
        """Remove the bytes, and tell every process that holds them."""
        manifest = (await self._manifests([digest])).get(digest)
        keys = _keys(digest, manifest) if manifest else [_key(digest)]
        with reaching_store():
            await self._redis.unlink(*keys)
            await self._redis.publish(DELETED_CHANNEL, _announcement(digest))

    async def _manifests(self, digests: Collection[str]) -> dict[str, _Manifest]:
        if not digests:
            return {}
        with reaching_store():
            values = cast(list[bytes | None], await self._redis.mget([_key(digest) for digest in digests]))
        found = ((digest, _manifest(digest, value)) for digest, value in zip(digests, values, strict=True))
        return {digest: manifest for digest, manifest in found if manifest}

    async def _read(self, digest: str, manifest: _Manifest) -> bytes | None:
        chunks: list[bytes] = []
        with reaching_store():
            for index in range(manifest.chunk_count):
                chunk = cast(bytes | None, await self._redis.get(_chunk_key(digest, index)))
                if chunk is None or len(chunk) > MAX_CHUNK_BYTES:
                    return None
                chunks.append(chunk)
        return b"".join(chunks)

    async def _extend(self, held: Mapping[str, _Manifest], ttl_s: int) -> None:
        """Let `held` live for `ttl_s` more; never shorten a life."""
        if not held:
            return
        with reaching_store():
            async with self._redis.pipeline(transaction=False) as pipeline:
                for digest, manifest in held.items():
                    for key in _keys(digest, manifest):
                        pipeline.expire(key, ttl_s, gt=True)
                await pipeline.execute()

    async def _forget(self, digest: str) -> None:
        with reaching_store():
            await self._redis.delete(_key(digest))


class MediaLibrary:
    """Every way to the bytes of a medium: what came with the request, this process's memory, the store.

    Everything is the current caller's tenant's: no tenant finds, removes or learns of what another has brought.
    """

    def __init__(self, store: MediaStore, cache: LocalMediaCache, max_media_bytes: int) -> None:
        self._store = store
        self._cache = cache
        self._max_media_bytes = max_media_bytes
        self._breaker = CircuitBreaker()

    async def find_missing(self, digests: Sequence[str]) -> list[str]:
        """Return those of `digests` that the store does not hold; raise `StoreUnavailable`.

        This process's memory does not count: another replica could not answer from it.
        """
        return await self._store.find_missing(digests)

    async def upload(self, digest: str, chunks: AsyncIterable[bytes]) -> StoredMedium:
        """Store what `chunks` bring, if it is what `digest` announces.

        Raises `MediaTooLarge` as soon as the limit is passed, `MediaDigestMismatch`, `MediaUnreadable` for no bytes at
        all, `StoreUnavailable`.
        """
        content = await self._received(digest, chunks)
        stored = await self._store.put(digest, content)
        self._cache.put(_place(digest), content)
        return stored

    async def identify(self, dialogue: Dialogue) -> Dialogue:
        """Return the dialogue with the digests of the media that came along, and remember their bytes."""
        return replace(dialogue, new=tuple([await self._identified(message) for message in dialogue.new]))

    async def content_of(self, medium: Medium) -> bytes:
        """Return the medium's bytes; raise `MediaNotFound` if nobody holds them, `StoreUnavailable`."""
        content = medium.content or self._cache.get(_place(medium.digest)) or await self._store.get(medium.digest)
        if content is None:
            raise _not_held(medium.digest)
        self._cache.put(_place(medium.digest), content)
        return content

    async def check_held(self, medium: Medium) -> None:
        """Raise `MediaNotFound` where an embedding could be found that was made from bytes of others only.

        Where embeddings are shared, a digest alone must not show a picture to a tenant that has never had it. Raises
        `StoreUnavailable` where that is not known.
        """
        if medium.content is not None or not current_caller().shares_embeddings:
            return
        if self._cache.get(_place(medium.digest)) is None and await self._store.find_missing([medium.digest]):
            raise _not_held(medium.digest)

    async def delete(self, digest: str) -> None:
        """Remove the medium's bytes everywhere; raise `StoreUnavailable`."""
        self.forget(digest)
        await self._store.delete(digest)

    def forget(self, digest: str) -> None:
        """Remove the medium's bytes from this process's memory."""
        self._cache.delete(_place(digest))

    def hear_deleted(self, announcement: bytes) -> None:
        """Remove what another process has removed, as `DELETED_CHANNEL` says, from this process's memory."""
        tenant, _, digest = announcement.decode().rpartition(":")
        self._cache.delete((tenant, digest))

    def forget_all(self) -> None:
        """Remove all bytes from this process's memory."""
        self._cache.clear()

    async def store(self, contents: Mapping[str, bytes], named: Collection[str], ttl_s: int) -> None:
        """Have the store hold `contents`, and those of `named` that it has, for `ttl_s`; raise `StoreUnavailable`."""
        for digest in await self._store.find_missing(list(contents)) if contents else ():
            await self._store.put(digest, contents[digest], ttl_s)
        await self._store.touch({*contents, *named}, ttl_s)

    async def keep(self, media: Sequence[Medium], ttl_s: int) -> None:
        """Have the store hold the bytes of `media` for `ttl_s` at least, where that can be done. Never raises."""
        carried = {medium.digest: medium.content for medium in media if medium.content is not None}
        try:
            for digest in await self._store.find_missing(list(carried)):
                await self._store.put(digest, carried[digest], ttl_s)
            await self._store.touch({medium.digest for medium in media}, ttl_s)
        except StoreUnavailable:
            log.warning("media_not_kept", media=len(media))

    async def note_use(self, media: Iterable[Medium]) -> None:
        """Let stored media that a turn refers to live on. Never raises, and stops trying a store that is away."""
        digests = {medium.digest for medium in media if medium.content is None}
        if not digests or not self._breaker.allow():
            return
        try:
            await self._store.touch(digests)
        except StoreUnavailable:
            self._breaker.record(success=False)
        else:
            self._breaker.record(success=True)

    async def _received(self, digest: str, chunks: AsyncIterable[bytes]) -> bytes:
        content, state = bytearray(), hashlib.sha256()
        async for chunk in chunks:
            content += chunk
            state.update(chunk)
            if len(content) > self._max_media_bytes:
                raise MediaTooLarge(f"A medium has at most {self._max_media_bytes} bytes.", field="chunk")
        if not content:
            raise MediaUnreadable("The medium has no bytes.", field="chunk")
        if state.hexdigest() != digest:
            raise MediaDigestMismatch("The bytes do not have the digest that was announced.", field="header.digest")
        return bytes(content)

    async def _identified(self, message: Message) -> Message:
        return replace(message, parts=tuple([await self._identified_part(part) for part in message.parts]))

    async def _identified_part(self, part: Part) -> Part:
        if not isinstance(part, MediaPart):
            return part
        return replace(part, media=tuple([await self.identify_medium(medium) for medium in part.media]))

    async def identify_medium(self, medium: Medium) -> Medium:
        """Return the medium with its digest; where its bytes came along, remember them."""
        if medium.content is None:
            return medium
        digest = await hash_content(medium.content)
        self._cache.put(_place(digest), medium.content)
        return replace(medium, digest=digest)


async def hash_content(content: bytes) -> str:
    """Return the digest of `content`, worked out beside the event loop when that takes long."""
    if len(content) <= _HASHED_ON_LOOP_BYTES:
        return digest_of(content)
    return await asyncio.to_thread(digest_of, content)


def _manifest(digest: str, value: bytes | None) -> _Manifest | None:
    if value is None:
        return None
    try:
        return _Manifest.model_validate_json(value)
    except ValidationError:
        log.warning("stored_media_rejected", digest=digest)
        return None


def _chunks(content: bytes) -> Iterator[bytes]:
    for start in range(0, len(content), MAX_CHUNK_BYTES):
        yield content[start : start + MAX_CHUNK_BYTES]


def _not_held(digest: str) -> MediaNotFound:
    return MediaNotFound("The bytes of this medium are not held; upload them.", resource=digest)


def _place(digest: str) -> tuple[str, str]:
    """Return where this process's memory has the current caller's medium."""
    return current_caller().tenant, digest


def _announcement(digest: str) -> str:
    tenant = current_caller().tenant
    return f"{tenant}:{digest}" if tenant else digest


def _key(digest: str) -> str:
    return f"{current_caller().key_prefix}media:{digest}"


def _chunk_key(digest: str, index: int) -> str:
    return f"{_key(digest)}:{index}"


def _keys(digest: str, manifest: _Manifest) -> list[str]:
    """Return the keys of a medium, the manifest last: it must not outlive a chunk."""
    return [*(_chunk_key(digest, index) for index in range(manifest.chunk_count)), _key(digest)]
