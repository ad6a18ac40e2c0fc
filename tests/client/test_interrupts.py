"""Ctrl-C at any moment of a stream, after which the same client goes on, as notebooks and terminals need it."""

import subprocess
import sys

from internvl_serving.gateway.v1 import chat_service_pb2
from tests.client.fake_gateway import FakeGateway, Responses, answer_of

# Interrupts itself again and again while it reads what comes as fast as it can. A process of its own: an interrupt that
# comes a moment late must not end the tests.
_READER = """
import os, random, signal, sys, threading
from contextlib import suppress
from internvl_client import Client

with Client(sys.argv[1]) as client:
    for turn in range(int(sys.argv[2])):
        late = threading.Timer(random.Random(turn).random() * 0.03, os.kill, (os.getpid(), signal.SIGINT))
        with suppress(KeyboardInterrupt):
            with client.stream("Go on for ever.") as stream:
                next(stream)
                late.start()
                for _ in stream:
                    pass
        late.join()
print("through")
"""
_INTERRUPTS = 100


def test_a_client_serves_on_after_interrupts_at_any_moment(gateway: FakeGateway) -> None:
    def flood(request: object, context: object) -> Responses:
        yield from list(answer_of())[:1]
        while context.is_active():  # type: ignore[attr-defined]
            yield chat_service_pb2.ChatResponse(delta=chat_service_pb2.ChatDelta(text="more "))

    gateway.answer = flood
    command = [sys.executable, "-c", _READER, gateway.address, str(_INTERRUPTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "through\n", done.stderr
    assert len(gateway.chats) == _INTERRUPTS
