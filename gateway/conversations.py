"""Kept conversations: one Redis hash each, one turn at a time, all or nothing.

Keys of a conversation: a hash of facts and messages, `:turns` (how the turns went that clients have named), `:lease`.
"""

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias, TypeVar, cast

import structlog
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from gateway.caller import current_caller
from gateway.content import Message
from gateway.conversation_index import ConversationIndex
from gateway.kept_turn import KeptTurn, Outcome, read_turn, write_turn
from gateway.records import ConversationRecord, read_messages, write_message
from shared.errors import (
    ConversationBusy,
    ConversationNotFound,
    InvalidRequest,
    NotPermitted,
    StoreUnavailable,
)
from shared.hold import Hold
from shared.reach import reaching_store

log = structlog.get_logger()
T = TypeVar("T")
Fields: TypeAlias = dict[bytes, bytes]

MAX_TTL_S = 30 * 86_400
MAX_PAGE_SIZE = 1000
MAX_KEPT_MESSAGES = 10_000  # a turn reads them all
DEFAULT_PAGE_SIZE = 100
_LOOK_EVERY_S = 0.25  # at a turn that is waited for
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
class ConversationPage:
    """Some conversations, the one used last first. An empty token: there are no more."""

    conversations: tuple[Conversation, ...]
    next_page_token: str = ""


@dataclass(frozen=True, slots=True)
class MessagePage:
    """Some messages of a conversation, oldest first. An empty token: there are no more."""

    messages: tuple[Message, ...]
    next_page_token: str = ""


@dataclass(frozen=True, slots=True)
class Past:
    """What was said in a conversation, and how long it outlives its last turn."""

    system_message: str | None
    ttl_s: int
    messages: tuple[Message, ...]


class Lease:
    """The right to add a turn to a conversation, held until `release` or until it has not been renewed in time.

    `system_message`, `messages` and `ttl_s` are the conversation's, as they were when the lease was taken. `earlier` is
    the very turn of `turn_id`, where it was kept before; then `messages` are those that precede it. A turn that was
    answered to its end is read whether or not the lease can be had: see `is_held`.
    """

    def __init__(self, redis: Redis, keys: "_Keys", duration_s: float, turn_id: str = "") -> None:
        self.conversation_id = keys.conversation_id
        self._redis = redis
        self._keys = keys
        self._turn_id = turn_id
        self._hold = Hold(redis, keys.lease, duration_s, turn_id)
        self.is_held = False
        self.awaits_itself = False
        self.system_message: str | None = None
        self.ttl_s = 0
        self.messages: tuple[Message, ...] = ()
        self.earlier: KeptTurn | None = None

    async def take(self) -> None:
        """Take the lease and read the conversation; raise `ConversationNotFound` or `ConversationBusy`.

        `awaits_itself`: the conversation is busy with this very turn.
        """
        with reaching_store():
            async with self._redis.pipeline() as pipeline:
                self._hold.queue_take(pipeline)
                self._hold.queue_look(pipeline)
                pipeline.pexpire(self._keys.messages, self._hold.duration_ms, gt=True)
                pipeline.hgetall(self._keys.messages)
                pipeline.hget(self._keys.turns, self._turn_id)
                is_taken, holder, _, fields, turn = await pipeline.execute()
        self.is_held = bool(is_taken)
        self.awaits_itself = not is_taken and self._hold.has_same_purpose(holder)
        about, messages = _understood(fields)
        self.earlier = None if turn is None else _readable(lambda: read_turn(turn, messages))
        if not is_taken and (self.earlier is None or self.earlier.is_cut_off):
            raise ConversationBusy("Another turn of this conversation is running.", retry_after_s=1.0)
        self.messages = messages if self.earlier is None else messages[: self.earlier.position]
        self.system_message, self.ttl_s = about.system_message, about.ttl_s

    async def append(self, *turn: Message, outcome: Outcome | None = None) -> str | None:
        """Add all messages of a turn or none, and return the id of the last one, the answer.

        They take the place of the same turn where that was cut off before. With `outcome` the turn can be read by its
        id from now on. None: they were not added, because the lease was lost or the conversation deleted meanwhile.
        Raises `StoreUnavailable` where it is not known whether they were added.
        """
        now, position = datetime.now(UTC), len(self.messages)
        ids = [_new_message_id() for _ in turn]
        added = _fields_of(turn, ids, now, position)

        def queue(pipeline: Pipeline) -> None:
            pipeline.hset(self._keys.messages, mapping=added)
            pipeline.expire(self._keys.messages, self.ttl_s)
            if self._turn_id and outcome:
                pipeline.hset(self._keys.turns, self._turn_id, write_turn(position, len(turn), outcome))
            pipeline.expire(self._keys.turns, self.ttl_s)

        return ids[-1] if await self._hold.run(queue) else None

    async def renew(self) -> bool:
        """Hold the lease for its whole duration again, and the conversation with it; False: it was lost."""

        def queue(pipeline: Pipeline) -> None:
            for key in self._keys.kept:
                pipeline.pexpire(key, self._hold.duration_ms, gt=True)

        return await self._hold.renew(queue)

    async def release(self) -> None:
        """Give the lease back. Never raises: what cannot be given back runs out."""
        await self._hold.release()


class ConversationStore:
    """The kept conversations of the current caller's tenant. Safe to share between tasks.

    Every method raises `StoreUnavailable`. What cannot be read back as a conversation is logged and treated as one that
    does not exist, and so is what belongs to another tenant. `lists_for_anybody`: conversations are listed for callers
    that nobody tells apart, too.
    """

    def __init__(
        self, redis: Redis, ttl_s: int, lease_s: float, max_text_chars: int, *, lists_for_anybody: bool = True
    ) -> None:
        self._redis = redis
        self._ttl_s = ttl_s
        self._max_text_chars = max_text_chars
        self._lease_s = lease_s
        self._lists_for_anybody = lists_for_anybody
        self._index = ConversationIndex(redis, MAX_TTL_S)

    async def create(
        self, system_message: str | None, ttl_s: int | None = None, messages: Sequence[Message] = ()
    ) -> Conversation:
        """Begin a conversation that outlives its last turn by `ttl_s`; None: the server's default.

        `messages` of another are its past, with the ids that they have.
        """
        if ttl_s is not None and not 1 <= ttl_s <= MAX_TTL_S:
            raise InvalidRequest("A conversation is kept for 1 second to 30 days.", field="ttl")
        if len(system_message or "") > self._max_text_chars:
            raise InvalidRequest(
                f"A system message has at most {self._max_text_chars} characters.", field="system_message"
            )
        keep_s = ttl_s or self._ttl_s
        conversation_id, now = secrets.token_urlsafe(24), datetime.now(UTC)
        about = ConversationRecord(system_message=system_message, ttl_s=keep_s, create_time=now)
        fields = _fields_of(messages, [message.message_id for message in messages], now)
        key = _Keys(conversation_id).messages
        with reaching_store():
            async with self._redis.pipeline() as pipeline:
                pipeline.hset(key, mapping=fields | {_ABOUT: about.model_dump_json()})
                pipeline.expire(key, keep_s)
                await pipeline.execute()
        await self._index.note_use(conversation_id)
        return Conversation(conversation_id, system_message, len(messages), now, now + timedelta(seconds=keep_s))

    async def get(self, conversation_id: str) -> Conversation:
        """Return the conversation; raise `ConversationNotFound`."""
        (found,) = await self._find([conversation_id])
        if found is None:
            raise _not_found()
        return found

    async def list_conversations(self, page_size: int, page_token: str) -> ConversationPage:
        """Return a page of the caller's conversations, the one used last first. Page size 0: the default.

        A page may have fewer than were asked for and not be the last. Raises `NotPermitted`.
        """
        if not (current_caller().tenant or self._lists_for_anybody):
            raise NotPermitted("Conversations are listed for callers with an API key only.")
        size = _checked_page_size(page_size, "conversations")
        page = await self._index.page(size, page_token)
        found = dict(zip(page.conversation_ids, await self._find(page.conversation_ids), strict=True))
        await self._index.forget([conversation_id for conversation_id, each in found.items() if each is None])
        return ConversationPage(tuple(each for each in found.values() if each is not None), page.next_page_token)

    async def read(self, conversation_id: str) -> Past:
        """Return all that was said; raise `ConversationNotFound`."""
        with reaching_store():
            fields = cast(Fields, await self._redis.hgetall(_Keys(conversation_id).messages))
        about, messages = _understood(fields)
        return Past(about.system_message, about.ttl_s, messages)

    async def list_messages(self, conversation_id: str, page_size: int, page_token: str) -> MessagePage:
        """Return a page of messages; raise `ConversationNotFound`. Page size 0: the default."""
        size = _checked_page_size(page_size, "messages")
        start, count = _position(page_token), (await self.get(conversation_id)).message_count
        end = min(start + size, count)
        if start >= end:
            return MessagePage(())
        names = [str(index) for index in range(start, end)]
        with reaching_store():
            values = cast(list[bytes | None], await self._redis.hmget(_Keys(conversation_id).messages, names))
        messages = _readable(lambda: read_messages(values))
        return MessagePage(messages, str(end) if end < count else "")

    async def delete(self, conversation_id: str) -> None:
        """Forget the conversation, with a turn that is running; raise `ConversationNotFound`."""
        keys = _Keys(conversation_id)
        with reaching_store():
            async with self._redis.pipeline() as pipeline:
                pipeline.delete(keys.messages)
                pipeline.delete(keys.turns, keys.lease)
                deleted, _ = await pipeline.execute()
        if not deleted:
            raise _not_found()
        await self._index.forget([conversation_id])

    @asynccontextmanager
    async def lease(self, conversation_id: str, turn_id: str = "") -> AsyncIterator[Lease]:
        """Hold the conversation for one turn; raise `ConversationNotFound` or `ConversationBusy`.

        Where the turn of `turn_id` runs already it is waited for, long enough for a gateway that has died to lose it.
        One that was answered to its end is read in any case, and its lease need not be held.
        """
        lease = Lease(self._redis, _Keys(conversation_id), self._lease_s, turn_id)
        try:
            await self._take(lease)
        except (ConversationNotFound, asyncio.CancelledError):
            await asyncio.shield(lease.release())
            raise
        if not lease.is_held:
            yield lease
            return
        renewal = asyncio.create_task(self._renew(lease))
        try:
            yield lease
        finally:
            renewal.cancel()
            # Shielded: a caller that is cancelled twice must not leave the conversation busy.
            await asyncio.shield(lease.release())

    async def note_use(self, conversation_id: str) -> None:
        """List the conversation first from now on. Never raises."""
        await self._index.note_use(conversation_id)

    async def _take(self, lease: Lease) -> None:
        """Take the lease, waiting while the conversation is busy with this very turn."""
        loop = asyncio.get_running_loop()
        latest = loop.time() + 2 * self._lease_s
        while True:
            try:
                return await lease.take()
            except ConversationBusy:
                if not lease.awaits_itself or loop.time() >= latest:
                    raise
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _find(self, conversation_ids: Sequence[str]) -> list[Conversation | None]:
        """Return the conversations; None for each that there is not, or not any more."""
        keys = [_Keys(conversation_id).messages for conversation_id in conversation_ids]
        with reaching_store():
            async with self._redis.pipeline() as pipeline:
                for key in keys:
                    pipeline.hget(key, _ABOUT)
                    pipeline.hlen(key)
                    pipeline.pttl(key)
                answers = iter(await pipeline.execute())
        facts = zip(conversation_ids, answers, answers, answers, strict=True)
        return [_conversation(*each) for each in facts]

    async def _renew(self, lease: Lease) -> None:
        is_held = True
        while is_held:
            await asyncio.sleep(self._lease_s / 3)
            try:
                is_held = await lease.renew()
            except StoreUnavailable:
                continue  # logged; the lease may outlive the fault
        log.warning("lease_lost")


class _Keys:
    """The names of what is kept of a conversation of the current caller's tenant; no other tenant finds it."""

    def __init__(self, conversation_id: str) -> None:
        if not _CONVERSATION_ID.fullmatch(conversation_id):
            raise _not_found()
        self.conversation_id = conversation_id
        # The braces keep the keys of a conversation together in a cluster.
        self.messages = f"{current_caller().key_prefix}conversation:{{{conversation_id}}}"
        self.turns, self.lease = f"{self.messages}:turns", f"{self.messages}:lease"
        self.kept = (self.messages, self.turns)


def _fields_of(
    messages: Sequence[Message], message_ids: Sequence[str], now: datetime, position: int = 0
) -> dict[Any, Any]:
    return {
        str(position + index): write_message(message, message_id, message.create_time or now)
        for index, (message, message_id) in enumerate(zip(messages, message_ids, strict=True))
    }


def _conversation(
    conversation_id: str, about_value: bytes | None, field_count: int, left_ms: int
) -> Conversation | None:
    try:
        about = _about(about_value)
    except ConversationNotFound:
        return None
    expire_time = datetime.now(UTC) + timedelta(milliseconds=left_ms)
    return Conversation(conversation_id, about.system_message, field_count - 1, about.create_time, expire_time)


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


def _checked_page_size(page_size: int, what: str) -> int:
    if not 0 <= page_size <= MAX_PAGE_SIZE:
        raise InvalidRequest(f"A page has 1 to {MAX_PAGE_SIZE} {what}.", field="page_size")
    return page_size or DEFAULT_PAGE_SIZE


def _position(page_token: str) -> int:
    if not re.fullmatch(r"[0-9]{0,9}", page_token):
        raise InvalidRequest("This is no page token of ours.", field="page_token")
    return int(page_token or 0)


def _new_message_id() -> str:
    return secrets.token_urlsafe(12)
