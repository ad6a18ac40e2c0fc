"""Judges what a system says of itself: what is well, what may become a trouble, what is one, and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from internvl_client.system import ModelStatus, ServiceStatus, StageState, StageStatus, StoreStatus, SystemStatus

_CLOCK_WARN_S: Final = 2.0
_CLOCK_FAIL_S: Final = 60.0
_MEMORY_WARN: Final = 512 << 20
_FULL: Final = 0.9
_GATEWAY: Final = "gateway"


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `advice` is what to do about it, where there is something to do."""

    subject: str
    level: Level
    fact: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Asked:
    """When a status was asked for and when it came, by this machine's clock, and the release of the client."""

    sent: datetime
    received: datetime
    version: str


def diagnose(status: SystemStatus, asked: Asked) -> list[Finding]:
    """Return the findings about a system that has answered."""
    services = _services(status)
    return [
        *_stages(status.stages),
        *_models(status.stages),
        _conversations(status.gateway.store),
        *_media(status.media_store),
        *_embeddings(status.stages),
        _versions(services, asked.version),
        _clocks(status, asked),
        *_memory(services),
    ]


def names_of(stages: Sequence[StageStatus]) -> list[str]:
    """Return what replicas are called: by their stage, and a number where it has several."""
    names = [stage.name.replace("_", " ") for stage in stages]
    return [
        name if names.count(name) == 1 else f"{name} {names[: index + 1].count(name)}"
        for index, name in enumerate(names)
    ]


def _services(status: SystemStatus) -> dict[str, ServiceStatus]:
    named = zip(names_of(status.stages), status.stages, strict=True)
    return {_GATEWAY: status.gateway} | {name: stage.status for name, stage in named if stage.status}


def _stages(stages: Sequence[StageStatus]) -> Iterator[Finding]:
    for name, stage in zip(names_of(stages), stages, strict=True):
        model = stage.status.model if stage.status else None
        if stage.state is StageState.READY:
            told = f"{model.name} on {model.devices}, {model.data_type}" if model else "it does not say what it serves"
            yield Finding(name, Level.OK, f"ready: {told}")
        elif stage.state is StageState.NOT_READY:
            yield Finding(
                name, Level.FAIL, "starting or shutting down", "wait until its log says `serving`, or read why not."
            )
        else:
            yield Finding(
                name,
                Level.FAIL,
                "the gateway cannot reach it, or it does not serve",
                f"see whether it runs, whether its log says `serving`, and whether the gateway's --{_flag(stage)} is "
                "its address.",
            )


def _flag(stage: StageStatus) -> str:
    return f"{stage.name.replace('_', '-')}-target"


def _models(stages: Sequence[StageStatus]) -> Iterator[Finding]:
    """Compare the checkpoints of the stages that work together: the system's own, and a critic's."""
    for prefix in ("", "critic_"):
        models = [
            (name, stage.status.model)
            for name, stage in zip(names_of(stages), stages, strict=True)
            if stage.name in (f"{prefix}vision", f"{prefix}llm") and stage.status and stage.status.model
        ]
        if len(models) > 1:
            yield _agreement("critic's models" if prefix else "models", models)


def _agreement(subject: str, models: Sequence[tuple[str, ModelStatus]]) -> Finding:
    shapes = {(model.hidden_size, model.tokens_per_tile) for _, model in models}
    told = ", ".join(f"{name} {model.name}" for name, model in models)
    if len(shapes) > 1:
        advice = "start vision and LLM services with the same --model: embeddings of one do not fit the other."
        return Finding(subject, Level.FAIL, f"they do not fit together: {told}", advice)
    if len({model.name for _, model in models}) > 1:
        advice = "the directories have different names: make sure that they hold the same checkpoint."
        return Finding(subject, Level.WARN, f"they may differ: {told}", advice)
    return Finding(subject, Level.OK, f"all are {models[0][1].name}")


def _conversations(store: StoreStatus | None) -> Finding:
    subject = "conversations"
    if store is None or not store.is_reachable:
        advice = "see whether Redis runs and --redis-url of the gateway is right. Until then nothing is kept."
        return Finding(subject, Level.FAIL, "their store cannot be reached", advice)
    told = f"{_used(store)}, {store.eviction_policy or 'eviction policy unknown'}"
    if store.eviction_policy not in ("", "noeviction"):
        advice = "a full store forgets conversations: set maxmemory-policy noeviction in it."
        return Finding(subject, Level.WARN, told, advice)
    if store.max_bytes and store.used_bytes > _FULL * store.max_bytes:
        advice = "a full store refuses what is new: raise its maxmemory, or shorten --conversation-ttl-s."
        return Finding(subject, Level.WARN, told, advice)
    return Finding(subject, Level.OK, told)


def _media(store: StoreStatus | None) -> Iterator[Finding]:
    """Judge the store of media, which may forget them: clients then send them again."""
    if store is None:
        return
    if store.is_reachable:
        yield Finding("media", Level.OK, f"{_used(store)}, {store.eviction_policy or 'eviction policy unknown'}")
    else:
        advice = "see whether Redis runs and --media-redis-url of the gateway is right. Until then uploads fail."
        yield Finding("media", Level.FAIL, "their store cannot be reached", advice)


def _embeddings(stages: Sequence[StageStatus]) -> Iterator[Finding]:
    for name, stage in zip(names_of(stages), stages, strict=True):
        if stage.status is None:
            continue
        subject, store = f"{name}: embeddings", stage.status.store
        if store is None:
            advice = "give it --redis-url, so that replicas share what was encoded."
            yield Finding(subject, Level.WARN, "no store", advice)
        elif not store.is_reachable:
            advice = "see whether Redis runs. Until then answers go on, and take longer."
            yield Finding(subject, Level.WARN, "their store cannot be reached", advice)
        elif store.eviction_policy == "noeviction" and store.max_bytes:
            advice = "a full store takes nothing new: set maxmemory-policy allkeys-lru in it."
            yield Finding(subject, Level.WARN, f"{_used(store)}, noeviction", advice)
        else:
            yield Finding(subject, Level.OK, f"{_used(store)}, {store.eviction_policy or 'eviction policy unknown'}")


def _versions(services: dict[str, ServiceStatus], own: str) -> Finding:
    told = {"this command": own} | {name: service.version for name, service in services.items()}
    known = {version for version in told.values() if version}
    if len(known) > 1:
        advice = "run one release everywhere, unless an upgrade is under way."
        return Finding(
            "versions", Level.WARN, ", ".join(f"{name} {version or '?'}" for name, version in told.items()), advice
        )
    return Finding("versions", Level.OK, f"{' '.join(known) or 'unknown'} everywhere")


def _clocks(status: SystemStatus, asked: Asked) -> Finding:
    """Compare clocks. An answer's time lies between its question and its arrival, or else a clock is wrong."""
    apart = {
        name: max((asked.sent - service.time).total_seconds(), (service.time - asked.received).total_seconds(), 0.0)
        for name, service in _services(status).items()
    }
    worst = max(apart, key=lambda name: apart[name])
    if apart[worst] <= _CLOCK_WARN_S:
        return Finding("clocks", Level.OK, f"within {max(apart[worst], 0.1):.1f} s of this machine's")
    level = Level.FAIL if apart[worst] > _CLOCK_FAIL_S else Level.WARN
    advice = "set the clocks by NTP: keys, certificates and what is kept expire by them."
    return Finding("clocks", level, f"that of {worst} is {apart[worst]:.1f} s from this machine's", advice)


def _memory(services: dict[str, ServiceStatus]) -> Iterator[Finding]:
    for name, service in services.items():
        if not service.available_bytes:
            continue
        told = f"holds {_size(service.resident_bytes)}, {_size(service.available_bytes)} left"
        if service.available_bytes < _MEMORY_WARN:
            advice = "give it more memory before the kernel ends it, or smaller caches (--local-cache-bytes)."
            yield Finding(f"{name}: memory", Level.WARN, told, advice)
        else:
            yield Finding(f"{name}: memory", Level.OK, told)


def _used(store: StoreStatus) -> str:
    return f"{_size(store.used_bytes)} of {_size(store.max_bytes)}" if store.max_bytes else _size(store.used_bytes)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB" if num_bytes >= 1 << 30 else f"{num_bytes / (1 << 20):.0f} MiB"
