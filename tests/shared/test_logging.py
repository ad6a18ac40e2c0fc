"""Logs show what happened and never a variable's value, and a reader that stops reading never stops a service."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from shared.log_sink import LogSink

ROOT = Path(__file__).parents[2]
CONFIGURE = """
import asyncio, gc, logging, sys, threading
import structlog
from shared.logging import configure_logging
from shared.settings import ServiceSettings

sink = configure_logging(ServiceSettings(log_format=sys.argv[1]), "example")
log = structlog.get_logger()
"""


def started(script: str, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CONFIGURE + script, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def events_of(output: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


FAILURES = """
def fail(prompt):
    raise ValueError("boom")

async def forgotten(prompt):
    raise ValueError("boom")

async def forget():
    asyncio.create_task(forgotten("CANARY-asyncio"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    gc.collect()

try:
    fail("CANARY-structlog")
except ValueError:
    log.exception("failed_here")
try:
    fail("CANARY-stdlib")
except ValueError:
    logging.getLogger("grpc").exception("failed there")
asyncio.run(forget())
sink.drain(5)
"""


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_tracebacks_show_the_error_and_no_variable(log_format: str) -> None:
    _, output = started(FAILURES, log_format).communicate(timeout=60)
    text = output.decode()
    assert text.count("ValueError") >= 3
    assert "failed_here" in text
    assert "failed there" in text
    assert "never retrieved" in text
    assert "CANARY" not in text


def test_standard_library_records_are_events_with_service_level_and_traceback() -> None:
    _, output = started(FAILURES, "json").communicate(timeout=60)
    events = events_of(output)
    assert [event["event"] for event in events[:2]] == ["failed_here", "failed there"]
    for event in events:
        assert event["service"] == "example"
        assert event["level"] == "error"
        assert event["exception"][0]["exc_type"] == "ValueError"


def test_events_of_other_threads_name_the_service_too() -> None:
    script = """
thread = threading.Thread(target=lambda: log.info("from_the_model_thread"))
thread.start(); thread.join()
sink.drain(5)
"""
    _, output = started(script, "json").communicate(timeout=60)
    assert events_of(output)[0]["service"] == "example"


FLOOD = """
for index in range(20_000):
    log.info("event", filler="x" * 100, index=index)
    logging.getLogger("grpc").warning("record")
print("went on", flush=True)
sys.stdin.readline()
log.info("read_again")
sink.drain(30)
"""


def test_a_full_pipe_stops_nothing_and_the_lines_that_it_cost_are_counted() -> None:
    command = [sys.executable, "-c", CONFIGURE + FLOOD, "json"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdout
        assert process.stdout.readline() == b"went on\n", "although nobody has read a line of the log"
        output = process.communicate(b"\n", timeout=60)[1]
    events = events_of(output)
    dropped = sum(event["lines"] for event in events if event["event"] == "log_lines_dropped")
    kept = sum(event["event"] in ("event", "record", "read_again") for event in events)
    assert dropped > 0
    assert kept + dropped == 40_001
    assert [event["index"] for event in events if event["event"] == "event"][:3] == [0, 1, 2]


def test_draining_a_sink_that_nobody_reads_ends_in_time_and_a_closed_one_does_no_harm() -> None:
    reader, writer = os.pipe()
    sink = LogSink(writer, max_lines=10)
    for _ in range(100):
        sink.write("x" * 10_000 + "\n")
    assert not sink.drain(0.2)
    os.close(reader)
    assert sink.drain(10), "the reader is gone, so every write fails at once"
    threads = threading.active_count()
    sink.write("lost\n")
    assert sink.drain(10)
    assert threading.active_count() == threads
