"""`internvl doctor` against a scripted gateway."""

import json
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from internvl_serving.common.v1 import status_pb2
from internvl_serving.gateway.v1 import system_service_pb2
from shared.service_status import release
from tests.client.command_line import run
from tests.client.fake_gateway import FakeGateway, refuse

pytestmark = pytest.mark.usefixtures("own_account")


def service(**more: Any) -> status_pb2.ServiceStatus:
    status = status_pb2.ServiceStatus(version=release(), available_bytes=4 << 30, **more)
    status.time.FromDatetime(datetime.now(UTC))
    return status


class TellingGateway(FakeGateway):
    """Says that all is well, but for what a test changes."""

    refusal: tuple[grpc.StatusCode, str] | None = None
    vision_state = system_service_pb2.STAGE_STATE_READY

    def GetStatus(self, request: Any, context: Any) -> system_service_pb2.GetStatusResponse:
        if self.refusal:
            refuse(context, *self.refusal)
        kept = status_pb2.StoreStatus(is_reachable=True, eviction_policy="noeviction")
        evicting = status_pb2.StoreStatus(is_reachable=True, eviction_policy="allkeys-lru", max_bytes=1 << 30)
        model = status_pb2.ModelStatus(
            name="tiny", hidden_size=64, tokens_per_tile=256, devices="cpu", data_type="float32"
        )
        stages = [
            system_service_pb2.Stage(name="vision", state=self.vision_state),
            system_service_pb2.Stage(
                name="llm", state=system_service_pb2.STAGE_STATE_READY, status=service(model=model, store=evicting)
            ),
        ]
        return system_service_pb2.GetStatusResponse(gateway=service(store=kept), stages=stages)


@pytest.fixture
def gateway_class() -> type[FakeGateway]:
    return TellingGateway


def test_a_system_that_is_well_is_exit_code_0(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out = run(capsys, monkeypatch, "doctor", "--address", gateway.address)
    assert code == 0, out
    lines = [line.split() for line in out.splitlines()]
    assert {line[0] for line in lines} == {"ok"}
    assert [line[1] for line in lines[:3]] == ["gateway", "vision", "llm"]
    assert "tiny on cpu, float32" in out


def test_what_is_wrong_comes_with_advice_and_exit_code_1(
    gateway: TellingGateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.vision_state = system_service_pb2.STAGE_STATE_UNREACHABLE
    code, out = run(capsys, monkeypatch, "doctor", "--address", gateway.address)
    assert code.endswith("checks failed.")
    failed = next(index for index, line in enumerate(out.splitlines()) if line.startswith("fail"))
    assert "--vision-target" in out.splitlines()[failed + 1]


def test_findings_can_be_read_by_programs(
    gateway: TellingGateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.vision_state = system_service_pb2.STAGE_STATE_NOT_READY
    code, out = run(capsys, monkeypatch, "doctor", "--json", "--address", gateway.address)
    assert code.startswith("internvl: 1 of ")
    findings = {finding["subject"]: finding for finding in json.loads(out)}
    assert findings["vision"]["level"] == "fail"
    assert findings["llm"] == {
        "subject": "llm",
        "level": "ok",
        "fact": "ready: tiny on cpu, float32",
        "advice": "",
    }


def test_a_gateway_that_does_not_answer_is_a_finding(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out = run(capsys, monkeypatch, "doctor", "--address", "127.0.0.1:1")
    assert code == "internvl: 1 of 1 checks failed."
    assert "no answer at 127.0.0.1:1" in out
    assert "internvl up" in out


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ((grpc.StatusCode.UNAUTHENTICATED, "API_KEY_INVALID"), "INTERNVL_API_KEY"),
        ((grpc.StatusCode.INTERNAL, "INTERNAL"), "does not say how it is"),
        ((grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE"), "does not say how it is"),
    ],
)
def test_a_gateway_that_does_not_say_how_it_is_is_a_finding(
    gateway: TellingGateway,
    refusal: tuple[grpc.StatusCode, str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gateway.refusal = refusal
    code, out = run(capsys, monkeypatch, "doctor", "--address", gateway.address)
    assert code == "internvl: 1 of 2 checks failed."
    assert said in out


def test_a_gateway_that_is_still_starting_is_a_finding(
    gateway: TellingGateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.readiness = health_pb2.HealthCheckResponse.NOT_SERVING
    code, out = run(capsys, monkeypatch, "doctor", "--address", gateway.address)
    assert code == "internvl: 1 of 1 checks failed."
    assert "--llm-target" in out


def test_a_gateway_of_an_older_release_is_no_failure(
    gateway: TellingGateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.refusal = (grpc.StatusCode.UNIMPLEMENTED, "")
    code, out = run(capsys, monkeypatch, "doctor", "--address", gateway.address)
    assert code == 0
    assert out.splitlines()[1].startswith("warn  status")
