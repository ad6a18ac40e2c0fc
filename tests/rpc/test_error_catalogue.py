"""Every reason in the catalogue of errors, brought about at a gateway and read off the wire: by gRPC and by HTTP.

`CAUSES` says how. A cause without a `script` is real: whoever calls the gateway can bring it about, or an operator by
leaving something away. With a `script` the scripted stage behind the gateway answers what only a stage can say.
"""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

import grpc
import httpx2
import pytest
from google.rpc import error_details_pb2, status_pb2

from gateway.http.problems import problem_of
from gateway.http.requests import ChatCompletionRequest
from gateway.keys import hash_of
from internvl_serving.gateway.v1 import (
    batch_service_pb2,
    chat_service_pb2,
    chat_service_pb2_grpc,
    content_pb2,
    conversation_service_pb2,
    system_service_pb2,
    system_service_pb2_grpc,
)
from shared.digest import digest_of
from shared.errors import (
    DeadlineExceeded,
    EmbeddingHandleInvalid,
    EmbeddingIncompatible,
    EmbeddingNotFound,
    InvalidGenerationConfig,
    NotReady,
    NotSupportedByModel,
    PromptTooLong,
    ServiceError,
    VideoRangeEmpty,
    reasons,
)
from shared.rpc.status import CallStatus, to_status
from tests.gateway.http.edge import CHAT, MODELS, data_url, picture
from tests.rpc.scripted_stages import (
    DOG,
    GENERATION,
    Client,
    ScriptedLlm,
    ScriptedVision,
    chat_request,
    gateway_over,
    stages_of,
    until_serving,
)

KEY, NOBODY, ELSEWHERE = "ivl_canary-acme", "127.0.0.1:1", "https://pictures.example/cat.png"
UNKNOWN: Final = "ab" * 32
LONG: Final = 1001  # more bytes or characters than these gateways take
# Windows as small as gRPC allows: a few messages fill them.
NARROW: Final = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_535)]

# What docs/http.md promises, and OpenAI's name for it.
HTTP: Final = {
    "INVALID_ARGUMENT": (400, "invalid_request_error"),
    "UNAUTHENTICATED": (401, "authentication_error"),
    "PERMISSION_DENIED": (403, "permission_error"),
    "NOT_FOUND": (404, "not_found_error"),
    "ABORTED": (409, "conflict_error"),
    "FAILED_PRECONDITION": (409, "conflict_error"),
    "RESOURCE_EXHAUSTED": (429, "rate_limit_error"),
    "INTERNAL": (500, "server_error"),
    "UNAVAILABLE": (503, "service_unavailable_error"),
    "DEADLINE_EXCEEDED": (504, "timeout_error"),
}


@dataclass(frozen=True)
class Scene:
    """A gateway with its stages, and a client of each kind. Both show a key where one is wanted."""

    client: Client
    http: httpx2.AsyncClient
    address: str
    metadata: tuple[tuple[str, str], ...]

    async def send(self, request: chat_service_pb2.ChatRequest) -> None:
        """Ask by gRPC and read the answer to its end."""
        async for _ in self.client.chat.Chat(request, metadata=self.metadata):
            pass

    async def post(self, *content: Any, **body: Any) -> httpx2.Response:
        """Ask by HTTP."""
        said = content[0] if len(content) == 1 and isinstance(content[0], str) else list(content)
        return await self.http.post(CHAT, json={"messages": [{"role": "user", "content": said}]} | body)

    @asynccontextmanager
    async def turn_in_progress(self, **request: Any) -> AsyncIterator[None]:
        """Have a turn at the model while the context lasts."""
        self.client.llm.gate = asyncio.Event()
        events = aiter(self.client.chat.Chat(chat_request("One?", **request), metadata=self.metadata))
        await anext(events)
        try:
            yield
        finally:
            self.client.llm.gate.set()
            assert [event async for event in events][-1].HasField("finished")


Act: TypeAlias = Callable[[Scene], Awaitable[Any]]
Script: TypeAlias = Callable[[Client], None]


@dataclass(frozen=True)
class Setting:
    """How a gateway is set up, and what is away of what it needs."""

    options: Mapping[str, Any] = field(default_factory=dict)
    away: frozenset[str] = frozenset()
    has_keys: bool = False


PLAIN = Setting({"max_media_bytes": LONG - 1, "max_text_chars": LONG - 1})
KEYED = Setting(has_keys=True)
CROWDED = Setting({"max_running_turns": 1, "max_waiting_turns": 0})
IMPATIENT = Setting({"client_stall_s": 0.3})
WITH_LOST_CRITIC = Setting({"critic_vision_target": NOBODY, "critic_llm_target": NOBODY, "replica_patience_s": 0})
WITHOUT_VISION = Setting({"replica_patience_s": 0}, away=frozenset({"vision"}))
WITHOUT_LLM = Setting(away=frozenset({"llm"}))
WITHOUT_STORE = Setting(away=frozenset({"store"}))


def asks(*parts: Any, **request: Any) -> Act:
    return lambda scene: scene.send(chat_request(*parts, **request))


def posts(*content: Any, **body: Any) -> Act:
    return lambda scene: scene.post(*content, **body)


ASK, POST = asks("Hi"), posts("Hi")


def while_another_runs(act: Act) -> Act:
    async def acted(scene: Scene) -> Any:
        async with scene.turn_in_progress():
            return await act(scene)

    return acted


def model_says(*errors: BaseException) -> Script:
    return lambda client: client.llm.errors.extend(errors)


def vision_says(error: ServiceError) -> Script:
    def said(client: Client) -> None:
        client.vision.error = error

    return said


@dataclass(frozen=True, kw_only=True)
class Cause:
    """How a client comes to be told a reason, and what it is told beside. None: this way it cannot be.

    `field`, `resource`, `quota` and `retries` say what details come along; `param` what HTTP calls the field.
    """

    grpc: Act | None = ASK
    http: Act | None = POST
    script: Script = lambda client: None
    setting: Setting = PLAIN
    field: str | None = None
    resource: str | None = None
    quota: str | None = None
    retries: bool = False
    param: str | None = None

    @property
    def details(self) -> set[str]:
        """The names of the details of the gRPC status."""
        named = {
            "BadRequest": self.field,
            "ResourceInfo": self.resource,
            "RetryInfo": self.retries,
            "QuotaFailure": self.quota,
        }
        return {"ErrorInfo", *(name for name, wanted in named.items() if wanted)}

    def error(self, reason: str) -> ServiceError:
        """Return the error that stands behind it."""
        wait_s = 1.5 if self.retries else None
        kind = reasons()[reason]
        return kind("Ours.", field=self.field, resource=self.resource, retry_after_s=wait_s, quota=self.quota)


async def ask_in_a_busy_conversation(scene: Scene) -> None:
    conversation_id = await scene.client.conversation()
    async with scene.turn_in_progress(conversation_id=conversation_id):
        await scene.send(chat_request("Two?", conversation_id=conversation_id))


async def ask_something_else_by_the_same_id(scene: Scene) -> None:
    conversation_id = await scene.client.conversation()
    for question in ("One?", "Two?"):
        await scene.send(chat_request(question, conversation_id=conversation_id, turn_id="t1"))


async def fork_at_a_message_that_is_not_there(scene: Scene) -> None:
    request = conversation_service_pb2.ForkConversationRequest(
        conversation_id=await scene.client.conversation(), message_id="nobody"
    )
    await scene.client.conversations.ForkConversation(request)


async def read_nothing(scene: Scene) -> None:
    scene.client.llm.deltas = [64 * "word "] * 50_000
    async with grpc.aio.insecure_channel(scene.address, options=NARROW) as channel:
        stub: Any = chat_service_pb2_grpc.ChatServiceStub(channel)
        events = aiter(stub.Chat(chat_request("Go on.")))
        await anext(events)
        await asyncio.wait_for(scene.client.llm.cancelled.wait(), 60)
        async for _ in events:
            pass


async def look_at_the_system(scene: Scene) -> None:
    stub: Any = system_service_pb2_grpc.SystemServiceStub(scene.client.channel)
    await stub.GetStatus(system_service_pb2.GetStatusRequest(), metadata=scene.metadata)


def uploads(digest: str) -> Act:
    return lambda scene: scene.client.upload(digest, DOG)


def puts(digest: str) -> Act:
    return lambda scene: scene.http.put(f"/v1/media/{digest}", content=DOG)


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def schema(said: str) -> dict[str, Any]:
    named = {"name": "answer", "schema": {"description": said}}
    return {"type": "json_schema", "json_schema": named}


CAUSES: Final[dict[str, Cause]] = {
    "INVALID_REQUEST": Cause(
        grpc=lambda scene: scene.send(chat_service_pb2.ChatRequest()),
        http=posts("Hi", temprature=1),
        field="messages",
        param="temprature",
    ),
    "EMPTY_MESSAGE": Cause(grpc=asks(), http=posts(""), field="messages[0]", param="messages[0].content"),
    "INVALID_GENERATION_CONFIG": Cause(  # by HTTP a body's own check comes first, but for what the LLM service looks at
        grpc=asks("Hi", generation_config=GENERATION(candidate_count=17)),
        http=posts("Hi", stop=""),
        script=model_says(InvalidGenerationConfig("Empty.", field="generation_config.stop_sequences")),
        field="generation_config.candidate_count",
        param="stop",
    ),
    "PROMPT_TOO_LONG": Cause(
        script=model_says(PromptTooLong("Long.", field="prompt")), field="messages", param="messages"
    ),
    "MEDIA_UNREADABLE": Cause(
        grpc=asks("What?", b""),
        http=posts(image(data_url(b""))),
        field="messages[0].parts[1].media",
        param="messages[0].content[0]",
    ),
    "MEDIA_TOO_LARGE": Cause(
        grpc=asks(b"x" * LONG),
        http=posts(picture(b"x" * LONG)),
        field="messages[0].parts[0].media",
        param="messages[0].content[0]",
    ),
    "MEDIA_DIGEST_MISMATCH": Cause(grpc=uploads(UNKNOWN), http=puts(UNKNOWN), field="header.digest", param="digest"),
    "VIDEO_RANGE_EMPTY": Cause(
        grpc=asks(DOG),
        http=posts({"type": "video_url", "video_url": {"url": data_url(DOG, "video/mp4")}}),
        script=vision_says(VideoRangeEmpty("Outside.")),
        field="messages[0].parts[0].media",
        param="messages[0].content[0]",
    ),
    "INVALID_JSON_SCHEMA": Cause(
        grpc=asks("Hi", generation_config=GENERATION(json_schema="{")),
        http=posts("Hi", response_format=schema("x" * LONG)),
        field="generation_config.json_schema",
        param="response_format",
    ),
    "NOT_SUPPORTED_BY_MODEL": Cause(
        grpc=asks("Hi", generation_config=GENERATION(grounding=True)),
        http=posts("Hi", grounding=True),
        script=model_says(NotSupportedByModel("No markers.", field="generation_config.grounding")),
        field="generation_config.grounding",
        param="grounding",
    ),
    "EMBEDDING_HANDLE_INVALID": Cause(
        grpc=asks(DOG), http=posts(picture(DOG)), script=model_says(EmbeddingHandleInvalid("Not ours."))
    ),
    "REMOTE_URL_REFUSED": Cause(grpc=None, http=posts(image(ELSEWHERE)), field="messages[0].content[0].image_url.url"),
    "CONVERSATION_NOT_FOUND": Cause(grpc=asks("Hi", conversation_id="x"), http=None),
    "MEDIA_NOT_FOUND": Cause(
        grpc=asks(content_pb2.Media(digest=UNKNOWN)), http=posts(image(f"ivl:sha256:{UNKNOWN}")), resource=UNKNOWN
    ),
    "EMBEDDING_NOT_FOUND": Cause(  # twice: after the first time it is encoded again
        grpc=asks(DOG),
        http=posts(picture(DOG)),
        script=model_says(*[EmbeddingNotFound("Gone.", resource=UNKNOWN) for _ in range(2)]),
        resource=UNKNOWN,
    ),
    "BATCH_NOT_FOUND": Cause(
        grpc=lambda scene: scene.client.batches.GetBatch(batch_service_pb2.GetBatchRequest(batch_id="x")), http=None
    ),
    "MESSAGE_NOT_FOUND": Cause(grpc=fork_at_a_message_that_is_not_there, http=None, resource="nobody"),
    "MODEL_NOT_FOUND": Cause(grpc=None, http=posts("Hi", model="gpt-4o"), resource="model"),
    "CONVERSATION_BUSY": Cause(grpc=ask_in_a_busy_conversation, http=None, retries=True),
    "TURN_ID_REUSED": Cause(grpc=ask_something_else_by_the_same_id, http=None, field="turn_id"),
    "EMBEDDING_INCOMPATIBLE": Cause(
        grpc=asks(DOG),
        http=posts(picture(DOG)),
        script=model_says(*[EmbeddingIncompatible("Another model's.") for _ in range(2)]),
    ),
    "NO_CRITIC": Cause(grpc=asks("Hi", ranking_method="RANKING_METHOD_CRITIC"), http=None),
    "QUEUE_FULL": Cause(
        grpc=while_another_runs(asks("Two?")),
        http=while_another_runs(posts("Two?")),
        setting=CROWDED,
        retries=True,
    ),
    "RATE_LIMITED": Cause(
        grpc=while_another_runs(asks("Two?")),
        http=while_another_runs(posts("Two?")),
        setting=KEYED,
        retries=True,
        quota="concurrent_requests",
    ),
    "CLIENT_TOO_SLOW": Cause(grpc=read_nothing, http=None, setting=IMPATIENT),
    "NOT_READY": Cause(setting=WITHOUT_LLM, retries=True),
    "VISION_UNAVAILABLE": Cause(grpc=asks(DOG), http=posts(picture(DOG)), setting=WITHOUT_VISION, retries=True),
    "LLM_UNAVAILABLE": Cause(  # as often as it is asked: it drains
        script=model_says(*[NotReady("Shutting down.", retry_after_s=1.0) for _ in range(20)]), retries=True
    ),
    "STORE_UNAVAILABLE": Cause(
        grpc=uploads(digest_of(DOG)), http=puts(digest_of(DOG)), setting=WITHOUT_STORE, retries=True
    ),
    "CRITIC_UNAVAILABLE": Cause(
        grpc=asks("Hi", ranking_method="RANKING_METHOD_CRITIC"), http=None, setting=WITH_LOST_CRITIC, retries=True
    ),
    "DEADLINE_EXCEEDED": Cause(script=model_says(DeadlineExceeded("Late."))),
    "INTERNAL": Cause(script=model_says(ValueError("/secret/path"))),
    "API_KEY_INVALID": Cause(
        grpc=lambda scene: scene.client.ask("Hi"),
        http=lambda scene: scene.http.get(MODELS, headers={"authorization": "Bearer wrong"}),
        setting=KEYED,
    ),
    "NOT_PERMITTED": Cause(grpc=look_at_the_system, http=lambda scene: scene.http.get("/metrics"), setting=KEYED),
}

_NO_CONVERSATIONS = "over HTTP a request carries its dialogue; no conversation is kept"
_NO_RANKING = "a body has no field that asks for a critic by name, and without one log-probability takes its place"
NOT_OVER_HTTP: Final = {
    "CONVERSATION_NOT_FOUND": _NO_CONVERSATIONS,
    "MESSAGE_NOT_FOUND": _NO_CONVERSATIONS,
    "CONVERSATION_BUSY": _NO_CONVERSATIONS,
    "TURN_ID_REUSED": _NO_CONVERSATIONS,
    "BATCH_NOT_FOUND": "there are no batches over HTTP",
    "NO_CRITIC": _NO_RANKING,
    "CRITIC_UNAVAILABLE": _NO_RANKING,
    "CLIENT_TOO_SLOW": "a client that takes nothing cannot be told anything: its connection is closed",
}
NOT_OVER_GRPC: Final = {
    "REMOTE_URL_REFUSED": "a medium is its bytes or their digest; there is no field for a URL",
    "MODEL_NOT_FOUND": "a request does not name a model",
}


@asynccontextmanager
async def scene_of(setting: Setting, tmp_path: Path, redis_url: str) -> AsyncIterator[Scene]:
    vision, llm, http_file = ScriptedVision(), ScriptedLlm(), tmp_path / "http"
    vision_stage, llm_stage = await stages_of(vision, llm)
    targets = {"vision": vision_stage.address, "llm": llm_stage.address, "store": redis_url}
    targets |= {name: f"redis://{NOBODY}" if name == "store" else NOBODY for name in setting.away}
    options, bearer = dict(setting.options), {"authorization": f"Bearer {KEY}"} if setting.has_keys else {}
    if setting.has_keys:
        options["keys_file"] = tmp_path / "keys.json"
        tenant = {
            "name": "acme",
            "keys": [{"name": "only", "sha256": hash_of(KEY)}],
            "limits": {"concurrent_requests": 1},
        }
        options["keys_file"].write_text(json.dumps({"tenants": [tenant]}))
    async with gateway_over(
        tmp_path, *targets.values(), http_listen="127.0.0.1:0", http_address_file=http_file, **options
    ) as channel:
        if "llm" not in setting.away:
            await until_serving(channel)
        async with httpx2.AsyncClient(base_url=f"http://{http_file.read_text()}", headers=bearer, timeout=60) as http:
            address = (tmp_path / "address").read_text()
            yield Scene(Client(channel, vision, llm), http, address, tuple(bearer.items()))
    await vision_stage.server.stop(None)
    await llm_stage.server.stop(None)


def check_status(reason: str, cause: Cause, told: CallStatus) -> None:
    """Check what a gRPC client is told."""
    assert told.code.name == reasons()[reason].code.value
    status = status_pb2.Status.FromString(dict(told.trailing_metadata)["grpc-status-details-bin"])
    assert (status.code, status.message) == (told.code.value[0], told.message)
    found: dict[str, Any] = {}
    for packed in status.details:
        detail = getattr(error_details_pb2, packed.type_url.rpartition(".")[2])()
        assert packed.Unpack(detail)
        found[type(detail).__name__] = detail
    assert set(found) == cause.details
    assert (found["ErrorInfo"].reason, found["ErrorInfo"].domain) == (reason, "internvl-serving")
    if cause.field:
        assert [violation.field for violation in found["BadRequest"].field_violations] == [cause.field]
    if cause.resource:
        assert found["ResourceInfo"].resource_name == cause.resource
    if cause.retries:
        assert found["RetryInfo"].retry_delay.ToMilliseconds() > 0
    if cause.quota:
        assert [violation.subject for violation in found["QuotaFailure"].violations] == [cause.quota]


def check_response(reason: str, cause: Cause, status: int, headers: Mapping[str, str], body: Any) -> None:
    """Check what an HTTP client is told."""
    expected, kind = HTTP[reasons()[reason].code.value]
    error = body["error"]
    param = cause.param or cause.field or cause.resource
    assert (status, error["code"], error["type"], error["param"]) == (expected, reason, kind, param)
    assert error["message"]
    assert headers.get("www-authenticate") == ("Bearer" if status == 401 else None)
    assert ("retry-after" in headers) == (cause.retries or status in (429, 503))
    if "retry-after" in headers:
        assert int(headers["retry-after"]) == max(1, math.ceil(int(headers["retry-after-ms"]) / 1000))


def test_every_reason_of_the_catalogue_has_a_cause_and_there_is_no_cause_of_anything_else() -> None:
    assert set(CAUSES) == set(reasons())


def test_what_cannot_arise_in_one_way_is_listed_with_its_reason() -> None:
    assert {reason for reason, cause in CAUSES.items() if cause.http is None} == set(NOT_OVER_HTTP)
    assert {reason for reason, cause in CAUSES.items() if cause.grpc is None} == set(NOT_OVER_GRPC)
    asked_by_http = set(ChatCompletionRequest.model_fields)
    assert not asked_by_http & {"conversation_id", "turn_id", "message_id", "batch_id", "ranking_method"}
    assert "model" not in chat_service_pb2.ChatRequest.DESCRIPTOR.fields_by_name
    assert set(content_pb2.Media.DESCRIPTOR.fields_by_name) == {"inline", "digest", "options"}


@pytest.mark.parametrize("reason", [reason for reason, cause in CAUSES.items() if cause.grpc])
async def test_a_grpc_client_is_told(reason: str, tmp_path: Path, redis_url: str) -> None:
    cause = CAUSES[reason]
    assert cause.grpc
    async with scene_of(cause.setting, tmp_path, redis_url) as scene:
        cause.script(scene.client)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cause.grpc(scene)
    error = caught.value
    check_status(reason, cause, CallStatus(error.code(), error.details() or "", tuple(error.trailing_metadata() or ())))


@pytest.mark.parametrize("reason", [reason for reason, cause in CAUSES.items() if cause.http])
async def test_an_http_client_is_told(reason: str, tmp_path: Path, redis_url: str) -> None:
    cause = CAUSES[reason]
    assert cause.http
    async with scene_of(cause.setting, tmp_path, redis_url) as scene:
        cause.script(scene.client)
        response = await cause.http(scene)
    check_response(reason, cause, response.status_code, response.headers, response.json())


@pytest.mark.parametrize("reason", NOT_OVER_HTTP)
def test_what_does_not_arise_over_http_would_be_told_so(reason: str) -> None:
    problem = problem_of(CAUSES[reason].error(reason))
    check_response(reason, CAUSES[reason], problem.status, problem.headers, json.loads(problem.content))


@pytest.mark.parametrize("reason", NOT_OVER_GRPC)
def test_what_does_not_arise_over_grpc_would_be_told_so(reason: str) -> None:
    check_status(reason, CAUSES[reason], to_status(CAUSES[reason].error(reason)))


async def test_an_upload_over_http_names_no_field_that_only_grpc_has(tmp_path: Path, redis_url: str) -> None:
    async with scene_of(PLAIN, tmp_path, redis_url) as scene:
        for content, reason in ((b"", "MEDIA_UNREADABLE"), (b"x" * LONG, "MEDIA_TOO_LARGE")):
            error = (await scene.http.put(f"/v1/media/{UNKNOWN}", content=content)).json()["error"]
            assert (error["code"], error["param"]) == (reason, None)


async def test_a_deadline_of_the_client_s_own_ends_its_call_by_the_same_code(tmp_path: Path, redis_url: str) -> None:
    async with scene_of(PLAIN, tmp_path, redis_url) as scene:
        scene.client.llm.gate = asyncio.Event()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in scene.client.chat.Chat(chat_request("Hi"), timeout=0.5):
                pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # gRPC's client says so, without our details
