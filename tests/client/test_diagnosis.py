"""What is found wrong with a system, from what it says of itself."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from internvl_client.diagnosis import Asked, Finding, Level, diagnose
from internvl_client.system import ModelStatus, ServiceStatus, StageState, StageStatus, StoreStatus, SystemStatus

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ASKED = Asked(NOW, NOW + timedelta(seconds=0.5), "1.0")
MODEL = ModelStatus("InternVL3-1B", 896, 256, "float32", "cpu")
KEPT = StoreStatus(True, "noeviction", 1 << 20, 1 << 30)
EVICTING = StoreStatus(True, "allkeys-lru", 1 << 20, 1 << 30)
PROCESS = ServiceStatus("1.0", NOW + timedelta(seconds=0.2), 1 << 28, 4 << 30)
STAGE = replace(PROCESS, model=MODEL, store=EVICTING)
GATEWAY = replace(PROCESS, store=KEPT)
VISION = StageStatus("vision", StageState.READY, STAGE)
LLM = StageStatus("llm", StageState.READY, STAGE)
WELL = SystemStatus(GATEWAY, (VISION, LLM))


def not_well(status: SystemStatus, asked: Asked = ASKED) -> dict[str, Finding]:
    return {finding.subject: finding for finding in diagnose(status, asked) if finding.level is not Level.OK}


def with_stage(stage: StageStatus) -> SystemStatus:
    return replace(WELL, stages=tuple(stage if other.name == stage.name else other for other in WELL.stages))


def test_a_system_that_is_well_has_findings_and_all_are_good() -> None:
    findings = diagnose(WELL, ASKED)
    assert {finding.level for finding in findings} == {Level.OK}
    assert [finding.subject for finding in findings] == [
        "vision",
        "llm",
        "models",
        "conversations",
        "vision: embeddings",
        "llm: embeddings",
        "versions",
        "clocks",
        "gateway: memory",
        "vision: memory",
        "llm: memory",
    ]
    assert not any(finding.advice for finding in findings)


@pytest.mark.parametrize("state", [StageState.NOT_READY, StageState.UNREACHABLE])
def test_a_stage_that_does_not_serve_is_a_failure_with_advice(state: StageState) -> None:
    found = not_well(with_stage(StageStatus("vision", state)))
    assert found["vision"].level is Level.FAIL
    assert found["vision"].advice


def test_an_older_stage_that_says_nothing_is_no_failure() -> None:
    assert not_well(with_stage(StageStatus("llm", StageState.READY))) == {}


def test_models_that_do_not_fit_together_are_a_failure_and_other_names_a_warning() -> None:
    other = replace(STAGE, model=replace(MODEL, name="InternVL3-8B", hidden_size=3584))
    assert not_well(with_stage(replace(LLM, status=other)))["models"].level is Level.FAIL
    renamed = replace(STAGE, model=replace(MODEL, name="copy"))
    assert not_well(with_stage(replace(LLM, status=renamed)))["models"].level is Level.WARN


def test_a_critic_is_compared_with_itself_only() -> None:
    critic = replace(STAGE, model=replace(MODEL, name="VisualPRM", hidden_size=3584))
    stages = [StageStatus(name, StageState.READY, critic) for name in ("critic_vision", "critic_llm")]
    assert not_well(SystemStatus(GATEWAY, (VISION, LLM, *stages))) == {}


def test_replicas_are_told_apart() -> None:
    lost = StageStatus("llm", StageState.UNREACHABLE)
    assert list(not_well(SystemStatus(GATEWAY, (VISION, LLM, lost)))) == ["llm 2"]


@pytest.mark.parametrize(
    ("store", "level"),
    [
        (None, Level.FAIL),
        (StoreStatus(False, "", 0, 0), Level.FAIL),
        (replace(KEPT, eviction_policy="volatile-lru"), Level.WARN),
        (replace(KEPT, used_bytes=1 << 30), Level.WARN),
        (replace(KEPT, eviction_policy=""), Level.OK),
        (replace(KEPT, max_bytes=0), Level.OK),
    ],
)
def test_the_store_of_conversations_is_there_and_forgets_nothing(store: StoreStatus | None, level: Level) -> None:
    found = not_well(replace(WELL, gateway=replace(GATEWAY, store=store)))
    assert (found["conversations"].level if found else Level.OK) is level


@pytest.mark.parametrize(
    ("store", "level"), [(None, Level.OK), (EVICTING, Level.OK), (StoreStatus(False, "", 0, 0), Level.FAIL)]
)
def test_a_store_of_media_is_there(store: StoreStatus | None, level: Level) -> None:
    found = {finding.subject: finding.level for finding in diagnose(replace(WELL, media_store=store), ASKED)}
    assert found.get("media", Level.OK) is level
    assert ("media" in found) is (store is not None)


@pytest.mark.parametrize(
    ("store", "level"),
    [
        (None, Level.WARN),
        (StoreStatus(False, "", 0, 0), Level.WARN),
        (KEPT, Level.WARN),
        (replace(KEPT, max_bytes=0), Level.OK),
        (EVICTING, Level.OK),
    ],
)
def test_the_store_of_embeddings_is_there_and_makes_room(store: StoreStatus | None, level: Level) -> None:
    found = not_well(with_stage(replace(VISION, status=replace(STAGE, store=store))))
    assert (found["vision: embeddings"].level if found else Level.OK) is level


@pytest.mark.parametrize(
    ("offset_s", "level"),
    [(0, Level.OK), (-1.5, Level.OK), (5, Level.WARN), (-5, Level.WARN), (120, Level.FAIL), (-120, Level.FAIL)],
)
def test_a_clock_that_is_wrong_is_found_whichever_way(offset_s: float, level: Level) -> None:
    late = replace(STAGE, time=NOW + timedelta(seconds=offset_s))
    found = not_well(with_stage(replace(LLM, status=late)))
    assert (found["clocks"].level if found else Level.OK) is level
    if found:
        assert "that of llm is" in found["clocks"].fact


def test_an_answer_that_took_long_says_nothing_about_clocks() -> None:
    slow = Asked(NOW - timedelta(seconds=10), NOW + timedelta(seconds=10), "1.0")
    assert not_well(WELL, slow) == {}


def test_releases_that_differ_are_named() -> None:
    found = not_well(with_stage(replace(LLM, status=replace(STAGE, version="0.9"))))
    assert "llm 0.9" in found["versions"].fact
    assert "versions" in not_well(WELL, Asked(ASKED.sent, ASKED.received, "2.0"))


def test_memory_that_runs_short_is_a_warning_and_unknown_memory_none() -> None:
    assert "llm: memory" in not_well(with_stage(replace(LLM, status=replace(STAGE, available_bytes=1 << 20))))
    assert not_well(with_stage(replace(LLM, status=replace(STAGE, available_bytes=0)))) == {}
