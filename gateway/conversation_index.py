"""Which conversations a tenant has, by when they were last used: a sorted set of ids, bounded, beside what it lists."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import structlog
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from gateway.caller import current_caller
from shared.errors import InvalidRequest, StoreUnavailable
from shared.reach import reaching_store

log = structlog.get_logger()
MAX_LISTED = 10_000  # per tenant; of more, those used longest ago are not listed, though they live on
_PAGE_TOKEN = re.compile(r"([0-9]{1,16})\.([A-Za-z0-9_-]{1,32})")


@dataclass(frozen=True, slots=True)
class IndexPage:
    """Some ids, the one used last first. An empty token: there are no more."""

    conversation_ids: tuple[str, ...]
    next_page_token: str = ""


class ConversationIndex:
    """The ids of the current caller's tenant. It may name conversations that have expired, until somebody says so."""

    def __init__(self, redis: Redis, keep_s: int, most: int = MAX_LISTED) -> None:
        """Take how long the longest-lived conversation outlives its last use, and how many are listed at most."""
        self._redis = redis
        self._keep_s = keep_s
        self._most = most

    async def note_use(self, conversation_id: str) -> None:
        """Put the conversation first. Never raises: what is not noted is only not listed."""
        key = _key()
        try:
            with reaching_store():
                async with self._redis.pipeline() as pipeline:
                    pipeline.zadd(key, {conversation_id: time.time_ns() // 1000})
                    pipeline.zremrangebyrank(key, 0, -self._most - 1)
                    pipeline.expire(key, self._keep_s)
                    await pipeline.execute()
        except StoreUnavailable:
            log.warning("conversation_not_listed")

    async def forget(self, conversation_ids: Sequence[str]) -> None:
        """Name these no longer. Never raises."""
        if not conversation_ids:
            return
        try:
            with reaching_store():
                await self._redis.zrem(_key(), *conversation_ids)
        except StoreUnavailable:
            log.warning("conversations_listed_still", conversations=len(conversation_ids))

    async def page(self, page_size: int, page_token: str) -> IndexPage:
        """Return a page; raise `InvalidRequest` for a token of somebody else's making, `StoreUnavailable`."""
        score, last = _place(page_token)
        key = _key()
        with reaching_store():
            async with self._redis.pipeline(transaction=False) as pipeline:
                # Those of the very moment at which the previous page ended, then those of earlier ones.
                _queue_range(pipeline, key, score or "+inf", score or "+inf")
                _queue_range(pipeline, key, f"({score}" if score else "+inf", "-inf", page_size + 1)
                same_moment, earlier = cast(list[list[tuple[bytes, float]]], await pipeline.execute())
        found = [*((member, at) for member, at in same_moment if member < last), *earlier]
        page, is_last = found[:page_size], len(found) <= page_size
        ids = tuple(member.decode() for member, _ in page)
        return IndexPage(ids, "" if is_last else f"{int(page[-1][1])}.{ids[-1]}")


def _queue_range(pipeline: Pipeline, key: str, highest: str, lowest: str, most: int | None = None) -> None:
    pipeline.zrange(
        key,
        highest,
        lowest,
        desc=True,
        byscore=True,
        withscores=True,
        offset=None if most is None else 0,
        num=most,
    )


def _place(page_token: str) -> tuple[str, bytes]:
    """Return the score and the id that the previous page ended with."""
    if not page_token:
        return "", b""
    match = _PAGE_TOKEN.fullmatch(page_token)
    if match is None:
        raise InvalidRequest("This is no page token of ours.", field="page_token")
    return match[1], match[2].encode()


def _key() -> str:
    return f"{current_caller().key_prefix}conversations"
