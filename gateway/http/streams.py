"""Server-sent events: a chunk each, a sign of life in between, an error as the last one, and the end."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.http.calls import event_of, hang_up, note
from gateway.http.problems import problem_of
from shared.errors import ClientTooSlow
from shared.rpc.interceptors import told

_DONE: Final = event_of(b"[DONE]")
_SIGN_OF_LIFE: Final = b": ping\n\n"  # a comment, which clients skip; what stands in between takes silence for death
_SILENCE_S: Final = 15.0


class EventStream(Response):
    """Streams chunks as they come. The response begins with the first, so that what fails before has its own status.

    What fails later is told as an event, and then `[DONE]` does not come: a client must not take half an answer for a
    whole one. A client that takes no event for `stall_s` is given up.
    """

    media_type = "text/event-stream"

    def __init__(
        self, chunks: AsyncGenerator[dict[str, Any], None], stall_s: float, silence_s: float = _SILENCE_S
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._silence_s = silence_s
        self._stall_s = stall_s
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        async with aclosing(self._chunks) as chunks:
            first = await anext(chunks)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            pulse = asyncio.create_task(self._pulse(send))
            try:
                await self._send(send, _event(first))
                async for chunk in chunks:
                    await self._send(send, _event(chunk))
                last = _DONE
            except ClientTooSlow as error:
                note(scope, problem_of(error))
                hang_up(scope)  # whatever else is sent would wait as well
                return
            except Exception as error:  # noqa: BLE001  the one place where an error becomes an event
                problem = problem_of(told(error, scope["path"]))
                note(scope, problem)
                last = event_of(problem.content)
            finally:
                pulse.cancel()
            await send({"type": "http.response.body", "body": last})

    async def _send(self, send: Send, event: bytes) -> None:
        try:
            async with asyncio.timeout(self._stall_s):
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except TimeoutError:
            raise ClientTooSlow("The client takes no events.") from None
        self._sent_at = asyncio.get_running_loop().time()

    async def _pulse(self, send: Send) -> None:
        while True:
            await asyncio.sleep(self._silence_s)
            if asyncio.get_running_loop().time() - self._sent_at >= self._silence_s:
                await send({"type": "http.response.body", "body": _SIGN_OF_LIFE, "more_body": True})


def _event(chunk: dict[str, Any]) -> bytes:
    return event_of(json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode())
