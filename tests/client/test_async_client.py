"""The asyncio client against a scripted gateway."""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from internvl_client import (
    AsyncClient,
    Client,
    DeadlineError,
    Delta,
    Finished,
    Image,
    NotFoundError,
    Started,
    UnavailableError,
)
from tests.client.fake_gateway import FakeGateway, answer_of, endless, refuse

LARGE = Image.from_bytes(os.urandom(300 << 10))


@pytest.fixture
async def aclient(gateway: FakeGateway) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(gateway.address, timeout_s=20) as client:
        yield client


async def until_cancelled(gateway: FakeGateway) -> bool:
    return await asyncio.to_thread(gateway.cancelled.wait, 5)


async def test_ask_returns_the_whole_answer(aclient: AsyncClient) -> None:
    assert (await aclient.ask(LARGE, "What is this?")).text == "It is a cat."


async def test_chat_yields_started_deltas_finished(aclient: AsyncClient) -> None:
    kinds = [type(event) async for event in aclient.chat(["Hello"])]
    assert kinds == [Started, Delta, Delta, Finished]


async def test_stream_yields_text_and_then_has_the_answer(aclient: AsyncClient) -> None:
    async with aclient.stream("Hello") as stream:
        assert [str(delta) async for delta in stream] == ["It ", "is a cat."]
        assert (await stream.answer()).text == "It is a cat."


async def test_a_picture_that_the_server_has_lost_is_uploaded_again(gateway: FakeGateway, aclient: AsyncClient) -> None:
    await aclient.ask(LARGE, "First")
    gateway.media.clear()
    await aclient.ask(LARGE, "Second")
    assert len(gateway.uploads) == 2


async def test_many_calls_run_at_once(aclient: AsyncClient) -> None:
    answers = await asyncio.gather(*(aclient.ask(f"Question {number}") for number in range(32)))
    assert {answer.text for answer in answers} == {"It is a cat."}


async def test_closing_a_stream_cancels_the_call(gateway: FakeGateway, aclient: AsyncClient) -> None:
    gateway.answer = lambda request, context: endless(gateway, context)
    async with aclient.stream("Hello") as stream:
        await anext(stream)
    assert await until_cancelled(gateway)


async def test_leaving_a_loop_cancels_the_call(gateway: FakeGateway, aclient: AsyncClient) -> None:
    gateway.answer = lambda request, context: endless(gateway, context)
    async for event in aclient.chat(["Hello"]):
        if isinstance(event, Delta):
            break
    assert await until_cancelled(gateway)


async def test_a_cancelled_task_cancels_the_call(gateway: FakeGateway, aclient: AsyncClient) -> None:
    gateway.answer = lambda request, context: endless(gateway, context)
    task = asyncio.create_task(aclient.ask("Hello"))
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await until_cancelled(gateway)


async def test_timeout_s_ends_the_call(gateway: FakeGateway, aclient: AsyncClient) -> None:
    gateway.answer = lambda request, context: endless(gateway, context)
    with pytest.raises(DeadlineError):
        await aclient.ask("Hello", timeout_s=0.2)


async def test_an_error_has_its_reason(gateway: FakeGateway, aclient: AsyncClient) -> None:
    def breaks_off(request: Any, context: grpc.ServicerContext) -> Any:
        yield from list(answer_of("Half"))[:2]
        refuse(context, grpc.StatusCode.UNAVAILABLE, "VISION_UNAVAILABLE")

    gateway.answer = breaks_off
    with pytest.raises(UnavailableError) as caught:
        await aclient.ask("Hello")
    assert caught.value.reason == "VISION_UNAVAILABLE"


async def test_conversations_are_created_read_and_deleted(gateway: FakeGateway, aclient: AsyncClient) -> None:
    conversation = await aclient.create_conversation(system_message="Be brief.")
    assert (await conversation.ask(LARGE, "Hello")).text == "It is a cat."
    assert (await conversation.info()).system_message == "Be brief."
    assert [message.text async for message in conversation.messages(page_size=2)] == ["0", "1", "2"]
    await conversation.delete()
    with pytest.raises(NotFoundError):
        await conversation.info()


async def test_readiness_is_what_the_health_service_says() -> None:
    server = grpc.aio.server()
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with AsyncClient(address) as client:
        for status in ("NOT_SERVING", "SERVING"):
            await checks.set("readiness", health_pb2.HealthCheckResponse.ServingStatus.Value(status))
            assert await client.is_ready() is (status == "SERVING")
            with Client(address) as blocking:
                assert await asyncio.to_thread(blocking.is_ready) is (status == "SERVING")
    await server.stop(0)
