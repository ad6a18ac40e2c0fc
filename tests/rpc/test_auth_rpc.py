"""API keys at the gateway's server: every rpc of every service is shut to those without one, health checks excepted."""

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc
from structlog.testing import capture_logs

from gateway.app import SERVICES
from gateway.keys import hash_of
from internvl_serving.gateway.v1 import batch_service_pb2, chat_service_pb2, content_pb2, media_service_pb2
from shared.digest import digest_of
from tests.gateway.fakes_gateway import redis_of
from tests.rpc.scripted_stages import CAT, DOG, Client, chat_request, error_of, running, text_of

ACME, UMBRELLA, ALONE = "ivl_canary-acme", "ivl_canary-umbrella", "ivl_canary-alone"
OPERATOR, WRONG = "ivl_canary-operator", "ivl_canary-unknown"
TRAITS = {"alone": {"isolated": True}, "operator": {"operator": True}}


def write_keys(file: Path, **tenants: str) -> None:
    """Put a file in place that lets each tenant in with one key, at once as Kubernetes does."""
    entries = [
        {"name": name, "keys": [{"name": "only", "sha256": hash_of(key)}]} | TRAITS.get(name, {})
        for name, key in tenants.items()
    ]
    new = file.with_suffix(".new")
    new.write_text(json.dumps({"tenants": entries}))
    new.replace(file)


class KeyedChannel:
    """A channel whose calls all show a key."""

    def __init__(self, channel: grpc.aio.Channel, key: str, header: str = "authorization") -> None:
        self._channel = channel
        self._metadata = ((header, f"Bearer {key}" if header == "authorization" else key),)

    def __getattr__(self, shape: str) -> Any:
        make = getattr(self._channel, shape)
        return lambda *method, **kind: functools.partial(make(*method, **kind), metadata=self._metadata)


class Guarded(NamedTuple):
    """A gateway that wants keys: clients by who they are, without a key and with one, and its keys file."""

    stranger: Client
    acme: Client
    umbrella: Client
    alone: Client
    keys_file: Path

    def as_key(self, key: str, header: str = "authorization") -> Client:
        client = self.stranger
        return Client(KeyedChannel(client.channel, key, header), client.vision, client.llm)  # type: ignore[arg-type]


@pytest.fixture
async def guarded(tmp_path: Path, redis_url: str) -> AsyncIterator[Guarded]:
    file = tmp_path / "keys.json"
    write_keys(file, acme=ACME, umbrella=UMBRELLA, alone=ALONE, operator=OPERATOR)
    async with running(tmp_path, redis_url, keys_file=file, keys_poll_s=0.01) as client:
        keyed = [
            Client(KeyedChannel(client.channel, key), client.vision, client.llm)  # type: ignore[arg-type]
            for key in (ACME, UMBRELLA, ALONE)
        ]
        yield Guarded(client, *keyed, file)


class Rpc(NamedTuple):
    """A method as its descriptor has it."""

    path: str
    shape: str
    request: Any
    response: Any

    async def call(self, channel: grpc.aio.Channel, *metadata: tuple[str, str], body: bytes = b"") -> bytes:
        """Send one message, and return what comes first."""
        method = getattr(channel, self.shape)(self.path)  # bytes both ways
        requests = iter([body]) if self.shape.startswith("stream") else body
        call = method(requests, metadata=metadata, timeout=20)
        try:
            if self.shape.endswith("unary"):
                return bytes(await call)
            return bytes(await anext(aiter(call), b""))
        finally:
            call.cancel()


def every_rpc() -> Iterable[Rpc]:
    pool = descriptor_pool.Default()
    for service in (*SERVICES, reflection.SERVICE_NAME):
        for method in pool.FindServiceByName(service).methods:
            shape = "_".join(
                "stream" if streams else "unary" for streams in (method.client_streaming, method.server_streaming)
            )
            kinds = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
            yield Rpc(f"/{service}/{method.name}", shape, *kinds)


RPCS = list(every_rpc())


def refusal(error: grpc.aio.AioRpcError) -> tuple[Any, ...]:
    """Everything that a client gets to see of a refusal."""
    trailing = {key: value for key, value in error.trailing_metadata() or () if key != "x-request-id"}
    return error.code(), error.details(), trailing


async def refusal_of(rpc: Rpc, channel: grpc.aio.Channel, *metadata: tuple[str, str], body: bytes = b"") -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rpc.call(channel, *metadata, body=body)
    return refusal(caught.value)


async def code_of(call: Awaitable[Any]) -> grpc.StatusCode | None:
    """The status of a call that fails; None: it does not."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return None


def test_the_rpcs_are_all_that_a_gateway_has() -> None:
    assert {rpc.shape for rpc in RPCS} == {"unary_unary", "unary_stream", "stream_unary", "stream_stream"}
    assert {rpc.path.split("/")[1] for rpc in RPCS} == {*SERVICES, "grpc.reflection.v1alpha.ServerReflection"}


SHOWN = {
    "a wrong key": ("authorization", f"Bearer {WRONG}"),
    "a wrong key by name": ("x-api-key", WRONG),
    "no bearer": ("authorization", f"Basic {ACME}"),
    "a hash": ("authorization", f"Bearer {hash_of(ACME)}"),
    "nothing": ("authorization", ""),
}


async def test_every_rpc_is_refused_without_a_key_and_with_any_wrong_one_alike(guarded: Guarded) -> None:
    channel = guarded.stranger.channel
    with capture_logs() as events:
        for rpc in RPCS:
            without = await refusal_of(rpc, channel)
            assert without[0] is grpc.StatusCode.UNAUTHENTICATED, rpc
            assert b"API_KEY_INVALID" in without[2]["grpc-status-details-bin"], rpc
            for name, shown in SHOWN.items():
                assert await refusal_of(rpc, channel, shown) == without, (rpc, name)
    finished = [event for event in events if event["event"] == "call_finished"]
    assert [event["method"] for event in finished] == [rpc.path for rpc in RPCS for _ in range(len(SHOWN) + 1)]
    assert {(event["code"], event["reason"]) for event in finished} == {("UNAUTHENTICATED", "API_KEY_INVALID")}
    assert guarded.stranger.llm.requests == []
    assert guarded.stranger.vision.headers == []


async def test_every_rpc_takes_a_key_that_is_known(guarded: Guarded) -> None:
    for rpc in RPCS:
        # What an empty message is answered with is the method's own affair.
        code = await code_of(rpc.call(guarded.stranger.channel, ("authorization", f"Bearer {OPERATOR}")))
        assert code not in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED), rpc


async def test_how_the_whole_system_is_is_for_operators(guarded: Guarded) -> None:
    for rpc in RPCS:
        code = await code_of(rpc.call(guarded.stranger.channel, ("authorization", f"Bearer {ACME}")))
        assert (code is grpc.StatusCode.PERMISSION_DENIED) == ("SystemService" in rpc.path), rpc


async def test_what_a_stranger_sends_is_not_even_read(guarded: Guarded) -> None:
    for rpc in RPCS:
        code, _, _ = await refusal_of(rpc, guarded.stranger.channel, body=b"\xff" * (1 << 20))
        assert code is grpc.StatusCode.UNAUTHENTICATED, rpc


async def test_health_checks_need_no_key(guarded: Guarded) -> None:
    stub = health_pb2_grpc.HealthStub(guarded.stranger.channel)
    for name in ("", "readiness", *SERVICES):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_answers_who_has_a_key(guarded: Guarded) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(guarded.acme.channel)
    answers = [answer async for answer in stub.ServerReflectionInfo(iter([request]))]
    assert {service.name for service in answers[0].list_services_response.service} >= set(SERVICES)


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
async def test_a_key_is_taken_either_way(guarded: Guarded, header: str) -> None:
    assert text_of(await guarded.as_key(ACME, header).ask("Hi")) == "A cat."


async def test_a_revoked_key_is_refused_and_a_new_one_taken_without_a_restart(guarded: Guarded) -> None:
    assert text_of(await guarded.acme.ask("Hi")) == "A cat."
    write_keys(guarded.keys_file, acme="ivl_canary-new")
    async with asyncio.timeout(20):
        while not await is_refused(guarded.acme):
            await asyncio.sleep(0.01)
    assert text_of(await guarded.as_key("ivl_canary-new").ask("Hi")) == "A cat."
    assert await is_refused(guarded.umbrella)


async def is_refused(client: Client) -> bool:
    code = await code_of(client.media.FindMissing(media_service_pb2.FindMissingRequest(digests=[digest_of(DOG)])))
    assert code in (None, grpc.StatusCode.UNAUTHENTICATED)
    return code is not None


async def test_a_stream_that_has_begun_outlives_its_key(guarded: Guarded) -> None:
    guarded.acme.llm.gate = asyncio.Event()
    stream = guarded.acme.chat.Chat(chat_request("Hi"))
    assert (await anext(aiter(stream))).WhichOneof("event") == "started"
    write_keys(guarded.keys_file, umbrella=UMBRELLA)
    async with asyncio.timeout(20):
        while not await is_refused(guarded.acme):
            await asyncio.sleep(0.01)
    guarded.acme.llm.gate.set()
    assert [event.WhichOneof("event") async for event in stream][-1] == "finished"


def by_digest(content: bytes) -> content_pb2.Media:
    return content_pb2.Media(digest=digest_of(content))


async def missing(client: Client, content: bytes) -> list[str]:
    answer = await client.media.FindMissing(media_service_pb2.FindMissingRequest(digests=[digest_of(content)]))
    return list(answer.missing_digests)


async def test_media_of_one_tenant_are_unknown_to_another_however_it_asks(guarded: Guarded) -> None:
    acme, umbrella = guarded.acme, guarded.umbrella
    await acme.upload(digest_of(DOG), DOG)
    assert text_of(await acme.ask(by_digest(DOG), "What is it?")) == "A cat."
    assert await missing(acme, DOG) == []
    # By now the bytes are in the store and in memory, and everybody's embedding is in every cache.
    assert await missing(umbrella, DOG) == [digest_of(DOG)]
    calls = [
        umbrella.ask(by_digest(DOG), "What is it?"),
        umbrella.media.Estimate(media_service_pb2.EstimateRequest(media=by_digest(DOG))),
    ]
    for call in calls:
        error = await error_of(call)
        assert (error.reason, error.resource) == ("MEDIA_NOT_FOUND", digest_of(DOG))
    prefetch = umbrella.media.Prefetch(media_service_pb2.PrefetchRequest(media=[by_digest(DOG)]))
    assert [answer.error.reason async for answer in prefetch] == ["MEDIA_NOT_FOUND"]
    await umbrella.upload(digest_of(DOG), DOG)
    await acme.media.DeleteMedium(media_service_pb2.DeleteMediumRequest(digest=digest_of(DOG)))
    assert await missing(acme, DOG) == [digest_of(DOG)]
    assert text_of(await umbrella.ask(by_digest(DOG), "What is it?")) == "A cat."


async def test_only_an_isolated_tenant_has_embeddings_of_its_own(guarded: Guarded) -> None:
    for client in (guarded.acme, guarded.umbrella, guarded.alone):
        await client.ask(CAT, "What is it?")
    vision = guarded.stranger.vision
    assert [header.tenant for header in vision.headers if header.media_digest == digest_of(CAT)][-1] == "alone"
    assert {header.tenant for header in vision.headers} == {"", "alone"}
    delete = media_service_pb2.DeleteMediumRequest(digest=digest_of(CAT))
    for client in (guarded.acme, guarded.alone):
        await client.media.DeleteMedium(delete)
    assert vision.erased == [("", digest_of(CAT)), ("alone", digest_of(CAT))]


async def results(client: Client, batch_id: str) -> list[Any]:
    request = batch_service_pb2.StreamResultsRequest(batch_id=batch_id)
    return [response.result async for response in client.batches.StreamResults(request)]


async def test_a_batch_is_its_tenant_s_and_asks_with_its_media(guarded: Guarded) -> None:
    await guarded.acme.upload(digest_of(DOG), DOG)
    items = [chat_request(by_digest(DOG), "What is it?"), chat_request("Hi")]
    create = batch_service_pb2.CreateBatchRequest(items=items)
    batch_id = (await guarded.acme.batches.CreateBatch(create)).batch.batch_id
    found = await results(guarded.acme, batch_id)
    assert sorted(result.item_index for result in found) == [0, 1]
    assert not any(result.HasField("error") for result in found)
    for stranger in (guarded.umbrella, guarded.alone):
        for call in (
            stranger.batches.GetBatch(batch_service_pb2.GetBatchRequest(batch_id=batch_id)),
            stranger.batches.CancelBatch(batch_service_pb2.CancelBatchRequest(batch_id=batch_id)),
            results(stranger, batch_id),
        ):
            assert (await error_of(call)).reason == "BATCH_NOT_FOUND"


async def test_conversations_are_their_tenant_s(guarded: Guarded) -> None:
    conversation_id = await guarded.acme.conversation()
    await guarded.acme.ask("Hi", conversation_id=conversation_id)
    assert (await error_of(guarded.umbrella.ask("Hi", conversation_id=conversation_id))).reason == (
        "CONVERSATION_NOT_FOUND"
    )


async def test_all_that_is_kept_for_a_tenant_is_named_after_it(guarded: Guarded, redis_url: str) -> None:
    redis = redis_of(redis_url)
    await redis.flushall()
    conversation_id = await guarded.acme.conversation()
    await guarded.acme.ask(CAT, "What is it?", conversation_id=conversation_id)
    await guarded.acme.upload(digest_of(DOG), DOG)
    create = batch_service_pb2.CreateBatchRequest(items=[chat_request(by_digest(DOG), "What is it?")])
    await results(guarded.acme, (await guarded.acme.batches.CreateBatch(create)).batch.batch_id)
    names = [name.decode() for name in await redis.keys("*")]
    await redis.aclose()
    assert len(names) > 8
    assert [name for name in names if not name.startswith("ivl:tenant:acme:")] == []


async def test_the_log_names_tenant_and_key_and_never_shows_one(
    guarded: Guarded, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG"), capture_logs() as events:
        await guarded.acme.ask(CAT, "What is it?")
        await error_of(guarded.as_key(WRONG).ask("Hi"))
        guarded.keys_file.write_text(f'{{"tenants": "{ACME}"}}')
        async with asyncio.timeout(20):
            while not any(event["event"] == "keys_file_rejected" for event in events):
                await asyncio.sleep(0.01)
    said = f"{events} {caplog.text} {''.join(capfd.readouterr())}"
    assert "call_finished" in said
    assert "ivl_canary" not in said
    assert not any(hash_of(key) in said for key in (ACME, UMBRELLA, ALONE, WRONG))


async def test_without_a_keys_file_any_key_will_do_and_none_as_well(tmp_path: Path, redis_url: str) -> None:
    async with running(tmp_path, redis_url) as client:
        assert text_of(await client.ask("Hi")) == "A cat."
        keyed = Client(KeyedChannel(client.channel, WRONG), client.vision, client.llm)  # type: ignore[arg-type]
        assert text_of(await keyed.ask("Hi")) == "A cat."
        stub: Any = chat_service_pb2.ChatRequest()
        assert (await error_of(anext(aiter(client.chat.Chat(stub))))).reason != "API_KEY_INVALID"
