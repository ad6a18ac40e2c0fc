"""A client that does not read its answer: the model is not held up, the answer ends, and others notice nothing."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from internvl_serving.gateway.v1 import chat_service_pb2_grpc
from shared.errors import ClientTooSlow, LlmUnavailable
from shared.rpc.status import from_rpc_error
from tests.rpc.scripted_stages import chat_request, running, text_of

# Windows as small as gRPC allows: a few messages fill them. By default they grow to some 4 MiB.
NARROW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_535)]
WORDS = 64 * "word "


@asynccontextmanager
async def narrow_stub(tmp_path: Path) -> AsyncIterator[Any]:
    """A second channel to the running gateway."""
    async with grpc.aio.insecure_channel((tmp_path / "address").read_text(), options=NARROW) as channel:
        yield chat_service_pb2_grpc.ChatServiceStub(channel)


async def test_an_answer_is_written_to_its_end_while_its_reader_lags_and_nothing_of_it_is_lost(tmp_path: Path) -> None:
    async with running(tmp_path, client_stall_s=60.0) as client, narrow_stub(tmp_path) as stub:
        client.llm.deltas = [f"{index} {WORDS}" for index in range(1000)]
        answer = aiter(stub.Chat(chat_request("go on", return_token_ids=True)))
        first = await anext(answer)
        await asyncio.sleep(1.0)  # this is the lag
        events = [first, *[event async for event in answer]]
    assert text_of(events) == "".join(client.llm.deltas)
    ids = [number for event in events for number in event.delta.token_ids]
    assert ids == list(range(1000))
    assert len(events) < 900  # what waited was merged
    assert events[-1].HasField("finished")


async def test_a_reader_that_has_stopped_loses_its_answer_and_the_model_is_told(tmp_path: Path) -> None:
    async with running(tmp_path, client_stall_s=0.3, max_running_turns=1) as client, narrow_stub(tmp_path) as stub:
        client.llm.deltas = [f"{index} {WORDS}" for index in range(50_000)]
        answer = aiter(stub.Chat(chat_request("go on")))
        await anext(answer)
        await client.llm.cancelled.wait()
        client.llm.deltas = ["Done."]
        assert text_of(await client.ask("And now?")) == "Done."  # there was one place, and it is free again
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in answer:
                pass
    assert isinstance(from_rpc_error(caught.value, LlmUnavailable), ClientTooSlow)


async def test_a_client_that_leaves_in_the_middle_of_a_write_is_not_an_error_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(tmp_path) as client, narrow_stub(tmp_path) as stub:
        client.llm.deltas = [f"{index} {WORDS}" for index in range(50_000)]
        call = stub.Chat(chat_request("go on"))
        await anext(aiter(call))
        call.cancel()
        await client.llm.cancelled.wait()
    assert "call_failed" not in capsys.readouterr().out
