"""The whole system as processes of one machine: Valkey, vision service, LLM service, gateway, and maybe a critic."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from deploy.local.process import ChildProcess
from deploy.local.service import LoadedModel, Service
from deploy.local.valkey import CACHE, CONVERSATIONS, Keeping, LocalValkey, ValkeyError

_POLL_S = 0.1
_VISION_NICE = 10  # only a tower on a CPU gives way
_EXIT_GRACE_S = 5.0  # what a service gets to leave after its drain


class StackError(Exception):
    """The system could not be started, or a part of it has stopped. `log_lines` are that part's last words."""

    def __init__(self, message: str, log_lines: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.log_lines = tuple(log_lines)


@dataclass(frozen=True, slots=True)
class StackOptions:
    """What to run. `logs` is the folder for log files; None makes one that goes away with the stack.

    `device` may name several GPUs, as in cuda:0,cuda:1: they share the language model's layers, and the vision tower is
    on the first.

    `http_listen` is where the gateway answers HTTP; empty: nowhere. With `http_port_fallback` a free port does as well,
    where that one is taken when the gateway begins to listen. `metrics` has every service show its metrics, on a
    free port where its variable does not say on which.

    `critic` is the checkpoint of a critic that ranks candidates; it gets a vision and an LLM service of its own.
    Anything else that a service can be told goes through its environment variables (`VISION_*`, `LLM_*`, `GATEWAY_*`).
    """

    model: Path
    listen: str = "127.0.0.1:0"
    device: str = "auto"
    dtype: str = "auto"
    logs: Path | None = None
    start_timeout_s: float = 900.0
    drain_grace_s: float = 5.0
    critic: Path | None = None
    http_listen: str = "127.0.0.1:0"
    http_port_fallback: bool = False
    metrics: bool = False


@dataclass(frozen=True, slots=True)
class PartState:
    """How far one part is: "starting", "loading", "ready", with a note and the seconds it has taken."""

    name: str
    state: str
    note: str
    seconds: float


@dataclass(slots=True)
class _Part:
    """A process and since when it is ready."""

    name: str
    process: ChildProcess
    service: Service | None = None
    ready_after_s: float | None = None

    def state(self) -> PartState:
        seconds = time.monotonic() - self.process.started
        if self.ready_after_s is None and (self.service is None or self.service.is_ready()):
            self.ready_after_s = seconds
        if self.ready_after_s is not None:
            return PartState(self.name, "ready", "", self.ready_after_s)
        if self.service is not None and self.service.address is not None:
            return PartState(self.name, "loading", self.service.loading_progress(), seconds)
        return PartState(self.name, "starting", "", seconds)


Report = Callable[[Sequence[PartState]], None]


class LocalStack:
    """Starts the system, stops it, and leaves nothing behind. A context manager.

    Start and stop it from one thread: the parts die with the thread that starts them.
    """

    def __init__(self, options: StackOptions) -> None:
        self._options = options
        self._directory: Path | None = None
        self._parts: list[_Part] = []
        self._failed = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def directory(self) -> Path:
        """Where log files are; made when first asked for."""
        if self._directory is None:
            self._directory = self._options.logs or Path(tempfile.mkdtemp(prefix="internvl-"))
            self._directory.mkdir(parents=True, exist_ok=True)
        return self._directory

    @property
    def address(self) -> str:
        """Where the gateway listens."""
        address = self.service("gateway").address
        assert address is not None
        return address

    @property
    def http_address(self) -> str:
        """Where the gateway answers HTTP; empty: nowhere."""
        return self._http_address_file.read_text() if self._options.http_listen else ""

    @property
    def _http_address_file(self) -> Path:
        return self.directory / "gateway-http.address"

    @property
    def metrics(self) -> dict[str, str]:
        """Where services answer `GET /metrics`, by their names; only those that do."""
        files = {part.name: self._metrics_file(part.name) for part in self._parts if part.service}
        return {name: file.read_text() for name, file in files.items() if file.exists()}

    @property
    def processes(self) -> dict[str, ChildProcess]:
        """The processes by name: valkey, valkey-conversations, vision, llm, gateway, critic-vision, critic-llm."""
        return {part.name: part.process for part in self._parts}

    @property
    def model(self) -> LoadedModel | None:
        """What the LLM service says it has loaded."""
        return self.service("llm").loaded_model()

    def service(self, name: str) -> Service:
        """Return a part by its name, Valkey excepted."""
        return next(part.service for part in self._parts if part.name == name and part.service)

    def start(self, report: Report = lambda states: None) -> None:
        """Start every part and return when all are ready; `report` sees their states meanwhile.

        On failure everything is stopped, and `StackError` is raised where a part is to blame.
        """
        try:
            self._start(report)
        except BaseException:
            self.stop()
            raise

    def restart(self, name: str, report: Report = lambda states: None) -> None:
        """Kill a service, start it again at the same address, and return when it is ready; raise `StackError`."""
        part = next(part for part in self._parts if part.name == name)
        assert part.service is not None
        part.service = part.service.again()
        part.process, part.ready_after_s = part.service.process, None
        deadline = time.monotonic() + self._options.start_timeout_s
        self._wait_until(lambda states: all(state.state == "ready" for state in states), report, deadline)

    def wait(self) -> NoReturn:
        """Wait until a part stops by itself, and raise `StackError` then."""
        while True:
            self._check_running("stopped")
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Stop the parts, last started first, and remove what they left; logs stay where a part has failed."""
        try:
            for part in reversed(self._parts):
                part.process.stop(self._options.drain_grace_s + _EXIT_GRACE_S)
        finally:  # a second Ctrl-C hurries
            for part in self._parts:
                part.process.kill()
            self._clean_up()

    def _clean_up(self) -> None:
        if self._directory is None:
            return
        for address_file in self._directory.glob("*.address"):
            address_file.unlink()
        if not (self._failed or self._options.logs):
            shutil.rmtree(self._directory, ignore_errors=True)

    def _start(self, report: Report) -> None:
        deadline = time.monotonic() + self._options.start_timeout_s
        valkey, conversations = self._valkey(CACHE), self._valkey(CONVERSATIONS)
        key = secrets.token_hex(32)
        models = {"": self._options.model} | ({"critic-": self._options.critic} if self._options.critic else {})
        stages = {
            f"{prefix}{stage}": self._stage(prefix, stage, model, valkey, key)
            for prefix, model in models.items()
            for stage in ("vision", "llm")
        }
        # The gateway only has to know where the stages listen; it waits for their models by itself.
        self._wait_until(lambda states: all(stage.address for stage in stages.values()), report, deadline)
        flags = ["--listen", self._options.listen]
        flags += http_flags(self._options, self._http_address_file)
        stores = {"GATEWAY_REDIS_URL": conversations.url(0), "GATEWAY_MEDIA_REDIS_URL": valkey.url(1)}
        for name, stage in stages.items():
            flags += [f"--{name}-target", str(stage.address)]
        self._add("gateway", "gateway", flags, stores)
        self._wait_until(lambda states: all(state.state == "ready" for state in states), report, deadline)

    def _valkey(self, keeping: Keeping) -> LocalValkey:
        try:
            valkey = LocalValkey(self.directory, keeping)
        except ValkeyError as error:
            raise self._failure(str(error)) from None
        self._parts.append(_Part(keeping.name, valkey.process))
        return valkey

    def _stage(self, prefix: str, stage: str, model: Path, valkey: LocalValkey, key: str) -> Service:
        # Secrets go by environment: flags can be read by every user of the machine.
        variables = stage.upper()
        environment = {f"{variables}_REDIS_URL": valkey.url(0), f"{variables}_EMBEDDING_KEY": key}
        flags = ["--model", str(model.resolve()), "--listen", "127.0.0.1:0", "--dtype", self._options.dtype]
        flags += [*device_flags(stage, self._options.device), "--neighbour-file", str(self.directory / "neighbour")]
        return self._add(f"{prefix}{stage}", f"{stage}_service", flags, environment)

    def _add(self, name: str, module: str, flags: list[str], environment: dict[str, str]) -> Service:
        flags += ["--drain-grace-s", str(self._options.drain_grace_s), "--log-format", "json"]
        flags += ["--metrics-address-file", str(self._metrics_file(name))]
        if self._options.metrics and f"{module.removesuffix('_service').upper()}_METRICS_LISTEN" not in os.environ:
            flags += ["--metrics-listen", "127.0.0.1:0"]
        service = Service(name, module, flags, environment, self.directory)
        self._parts.append(_Part(name, service.process, service))
        return service

    def _metrics_file(self, name: str) -> Path:
        return self.directory / f"{name}-metrics.address"

    def _wait_until(self, condition: Callable[[Sequence[PartState]], bool], report: Report, deadline: float) -> None:
        while True:
            self._check_running("stopped while starting")
            states = [part.state() for part in self._parts]
            report(states)
            if condition(states):
                return
            if time.monotonic() > deadline:
                waiting = ", ".join(state.name for state in states if state.state != "ready")
                raise self._failure(f"not ready after {self._options.start_timeout_s:.0f} s: {waiting}")
            time.sleep(_POLL_S)

    def _check_running(self, what: str) -> None:
        for part in self._parts:
            if (code := part.process.exit_code) is not None:
                raise self._failure(f"{part.name} {what} ({_ending(code)})", part.process.last_lines())

    def _failure(self, message: str, log_lines: Sequence[str] = ()) -> StackError:
        self._failed = True
        return StackError(f"{message}; logs are in {self.directory}", log_lines)


def device_flags(stage: str, device: str) -> list[str]:
    """Return what tells a vision or an LLM service where it runs.

    The vision tower gets the first device, or the only one, and the language model leaves room for it there. Of CPUs it
    takes what the language model leaves.
    """
    if stage == "vision":
        return ["--device", device.partition(",")[0], "--cpu-nice", str(_VISION_NICE)]
    return ["--device", device, "--vit-shares-first-device"]


def http_flags(options: StackOptions, address_file: Path) -> list[str]:
    """Return what tells the gateway where it answers HTTP."""
    if not options.http_listen:
        return []
    fallback = ["--http-port-fallback"] if options.http_port_fallback else []
    return ["--http-listen", options.http_listen, *fallback, "--http-address-file", str(address_file)]


def _ending(exit_code: int) -> str:
    return f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
