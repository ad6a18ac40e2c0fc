"""Kept conversations: one Redis hash each, one turn at a time, all or nothing."""

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias, TypeVar, cast

import structlog
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from gateway.content import Message
from gateway.records import ConversationRecord, read_messages, write_message
from shared.errors import ConversationBusy, ConversationNotFound, InvalidRequest, StoreUnavailable
from shared.hold import Hold
from shared.reach import reaching_store

log = structlog.get_logger()
T = TypeVar("T")
Fields: TypeAlias = dict[bytes, bytes]

MAX_TTL_S = 30 * 86_400
MAX_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 100
_ABOUT = "about"  # the hash's field for everything but messages, which are fields "0", "1", ...
_CONVERSATION_ID = re.compile(r"[A-Za-z0-9_-]{32}")


@dataclass(frozen=True, slots=True)
class Conversation:
    """A kept dialogue without its messages."""

    conversation_id: str
    system_message: str | None
    message_count: int
    create_time: datetime
    expire_time: datetime


@dataclass(frozen=True, slots=True)
class MessagePage:
    """Some messages of a conversation, oldest first. An empty token: there are no more."""

    messages: tuple[Message, ...]
    next_page_token: str = ""


class Lease:
    """The right to add a turn to a conversation, held until `release` or until it has not been renewed in time.

    `system_message`, `messages` and `ttl_s` are the conversation's, as they were when the lease was taken.
    """

    def __init__(self, redis: Redis, conversation_id: str, duration_s: float) -> None:
        self._redis = redis
        self._key = _key(conversation_id)
        self._hold = Hold(redis, _lease_key(conversation_id), duration_s)
        self.system_message: str | None = None
        self.ttl_s = 0
        self.messages: tuple[Message, ...] = ()

    async def take(self) -> None:
        """Take the lease and read the conversation; raise `ConversationNotFound` or `ConversationBusy`."""
        with reaching_store():
            async with self._redis.pipeline() as pipeline:
                self._hold.queue_take(pipeline)
                pipeline.pexpire(self._key, self._hold.duration_ms, gt=True)
                pipeline.hgetall(self._key)
                is_taken, _, fields = await pipeline.execute()
        if fields and not is_taken:
            raise ConversationBusy("Another turn of this conversation is running.", retry_after_s=1.0)
        about, self.messages = _understood(fields)
        self.system_message, self.ttl_s = about.system_message, about.ttl_s

    async def append(self, *turn: Message) -> str | None:
        """Add all messages of a turn or none, and return the id of the last one, the answer.

        None: they were not added, because the lease was lost or the conversation deleted meanwhile. Raises
        `StoreUnavailable` where it is not known whether they were added.
        """
        now, count = datetime.now(UTC), len(self.messages)
        ids = [_new_message_id() for _ in turn]
        added: dict[Any, Any] = {
            str(count + index): write_message(message, message_id, now)
            for index, (message, message_id) in enumerate(zip(turn, ids, strict=True))
        }

        def queue(pipeline: Pipeline) -> None:
            pipeline.hset(self._key, mapping=added)
            pipeline.expire(self._key, self.ttl_s)

        return ids[-1] if await self._hold.run(queue) else None

    async def renew(self) -> bool:
        """Hold the lease for its whole duration again, and the conversation with it; False: it was lost."""
        return await self._hold.renew(lambda pipeline: pipeline.pexpire(self._key, self._hold.duration_ms, gt=True))

    async def release(self) -> None:
        """Give the lease back. Never raises: what cannot be given back runs out."""
        await self._hold.release()


class ConversationStore:
    """Kept conversations. Safe to share between tasks; every method raises `StoreUnavailable`.

    What cannot be read back as a conversation is logged and treated as one that does not exist.
    """

    def __init__(self, redis: Redis, ttl_s: int, lease_s: float, max_text_chars: int) -> None:
        self._redis = redis
        self._ttl_s = ttl_s
        self._max_text_chars = max_text_chars
        self._lease_s = lease_s

    async def create(self, system_message: str | None, ttl_s: int | None = None) -> Conversation:
        """Begin a conversation that outlives its last turn by `ttl_s`; None: the server's default."""
        if ttl_s is not None and not 1 <= ttl_s <= MAX_TTL_S:
            raise InvalidRequest("A conversation is kept for 1 second to 30 days.", field="ttl")
        if len(system_message or "") > self._max_text_chars:
            raise InvalidRequest(
                f"A system message has at most {self._max_text_chars} characters.", field="system_message"
            )
        keep_s = ttl_s or self._ttl_s
        conversation_id, now = secrets.token_urlsafe(24), datetime.now(UTC)
        about = ConversationRecord(system_message=system_message, ttl_s=keep_s, create_time=now)
        with reaching_store():
            async with self._redis.pipeline() as pipeline:
                pipeline.hset(_key(conversation_id), _ABOUT, about.model_dump_json())
                pipeline.expire(_key(conversation_id), keep_s)
                await pipeline.execute()
        return Conversation(conversation_id, system_message, 0, now, now + timedelta(seconds=keep_s))

    async def get(self, conversation_id: str) -> Conversation:
        """Return the conversation; raise `ConversationNotFound`."""
        key = _key(conversation_id)
        with reaching_store():
            async with self._redis.pipeline() as pipeline:
                pipeline.hget(key, _ABOUT)
                pipeline.hlen(key)
                pipeline.pttl(key)
                about_value, field_count, left_ms = await pipeline.execute()
        about = _about(about_value)
        expire_time = datetime.now(UTC) + timedelta(milliseconds=left_ms)
        return Conversation(conversation_id, about.system_message, field_count - 1, about.create_time, expire_time)

    async def list_messages(self, conversation_id: str, page_size: int, page_token: str) -> MessagePage:
        """Return a page of messages; raise `ConversationNotFound`. Page size 0: the default."""
        if not 0 <= page_size <= MAX_PAGE_SIZE:
            raise InvalidRequest(f"A page has 1 to {MAX_PAGE_SIZE} messages.", field="page_size")
        start, count = _position(page_token), (await self.get(conversation_id)).message_count
        end = min(start + (page_size or DEFAULT_PAGE_SIZE), count)
        if start >= end:
            return MessagePage(())
        names = [str(index) for index in range(start, end)]
        with reaching_store():
            values = cast(list[bytes | None], await self._redis.hmget(_key(conversation_id), names))
        messages = _readable(lambda: read_messages(values))
        return MessagePage(messages, str(end) if end < count else "")

    async def delete(self, conversation_id: str) -> None:
        """Forget the conversation, with a turn that is running; raise `ConversationNotFound`."""
        with reaching_store():
            async with self._redis.pipeline() as pipeline:
                pipeline.delete(_key(conversation_id))
                pipeline.delete(_lease_key(conversation_id))
                deleted, _ = await pipeline.execute()
        if not deleted:
            raise _not_found()

    @asynccontextmanager
    async def lease(self, conversation_id: str) -> AsyncIterator[Lease]:
        """Hold the conversation for one turn; raise `ConversationNotFound` or `ConversationBusy`."""
        lease = Lease(self._redis, conversation_id, self._lease_s)
        try:
            await lease.take()
        except (ConversationNotFound, asyncio.CancelledError):
            await asyncio.shield(lease.release())
            raise
        renewal = asyncio.create_task(self._renew(lease))
        try:
            yield lease
        finally:
            renewal.cancel()
            # Shielded: a caller that is cancelled twice must not leave the conversation busy.
            await asyncio.shield(lease.release())

    async def _renew(self, lease: Lease) -> None:
        is_held = True
        while is_held:
            await asyncio.sleep(self._lease_s / 3)
            try:
                is_held = await lease.renew()
            except StoreUnavailable:
                continue  # logged; the lease may outlive the fault
        log.warning("lease_lost")


def _understood(fields: Fields) -> tuple[ConversationRecord, tuple[Message, ...]]:
    about = _about(fields.get(_ABOUT.encode()))
    values = [fields.get(str(index).encode()) for index in range(len(fields) - 1)]
    return about, _readable(lambda: read_messages(values))


def _about(value: bytes | None) -> ConversationRecord:
    if value is None:
        raise _not_found()
    return _readable(lambda: ConversationRecord.model_validate_json(value))


def _readable(read: Callable[[], T]) -> T:
    try:
        return read()
    except ValueError:  # pydantic's own is one
        log.error("stored_conversation_rejected")
        raise _not_found() from None


def _not_found() -> ConversationNotFound:
    return ConversationNotFound("There is no such conversation, or it has expired.")


def _position(page_token: str) -> int:
    if not re.fullmatch(r"[0-9]{0,9}", page_token):
        raise InvalidRequest("This is no page token of ours.", field="page_token")
    return int(page_token or 0)


def _new_message_id() -> str:
    return secrets.token_urlsafe(12)


def _key(conversation_id: str) -> str:
    if not _CONVERSATION_ID.fullmatch(conversation_id):
        raise _not_found()
    # The braces keep the keys of a conversation together in a cluster.
    return f"ivl:conversation:{{{conversation_id}}}"


def _lease_key(conversation_id: str) -> str:
    return f"{_key(conversation_id)}:lease"
