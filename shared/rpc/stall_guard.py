"""Writes a stream to its client, and ends a call whose client no longer reads."""

import asyncio
from types import TracebackType
from typing import Any, Self

import grpc

from shared.errors import ClientTooSlow


class StallGuard:
    """A context around all writes of one call: raises `ClientTooSlow` where one takes longer than `stall_s`.

    gRPC takes a message as written once the client's flow control has room for it, so a write that lasts is a client
    that does not read. One timer a stream watches, not one a write: those would cost every token of every answer.
    """

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._loop = asyncio.get_running_loop()
        self._writing_since: float | None = None
        self._is_stalled = False

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        self._timer = self._loop.call_later(self._stall_s, self._check)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._timer.cancel()
        # As in asyncio.timeout: nobody else must have cancelled the task as well.
        if self._is_stalled and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise ClientTooSlow("The answer was not read; it ends here.") from error

    async def write(self, context: "grpc.aio.ServicerContext[Any, Any]", response: Any) -> None:
        """Write a message; be cancelled where the client has gone, or reads nothing for too long."""
        self._writing_since = self._loop.time()
        try:
            await context.write(response)
        except grpc.aio.InternalError:  # the call ended in the middle of the write
            raise asyncio.CancelledError from None
        self._writing_since = None

    def _check(self) -> None:
        now = self._loop.time()
        due = (now if self._writing_since is None else self._writing_since) + self._stall_s
        if due > now:
            self._timer = self._loop.call_at(due, self._check)
            return
        self._is_stalled = True
        self._task.cancel()
