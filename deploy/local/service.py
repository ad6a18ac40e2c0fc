"""One of our services as a child process: where it listens, whether it is ready, what it says of itself."""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from deploy.local.process import ChildProcess
from internvl_client import Client, InternVLError


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What a service says about the model it has loaded."""

    name: str
    device: str
    dtype: str


class Service:
    """A `python -m MODULE` that listens on a port it chose or was given."""

    def __init__(
        self, name: str, module: str, flags: Sequence[str], environment: Mapping[str, str], directory: Path
    ) -> None:
        self.name = name
        self._module, self._flags, self._environment, self._directory = module, tuple(flags), environment, directory
        self._address_file = directory / f"{name}.address"
        self._health_file = directory / f"{name}-health.address"
        self._ready = False
        # Asked apart from the service's own port, which may want TLS and keys.
        health = ["--health-listen", "127.0.0.1:0", "--health-address-file", str(self._health_file)]
        command = [sys.executable, "-m", module, *flags, *health, "--address-file", str(self._address_file)]
        self.process = ChildProcess(name, command, environment, directory / f"{name}.log")

    def again(self) -> Self:
        """Kill it, and start another one like it where it listened. Call it once it has an address."""
        address = self.address
        assert address is not None
        self.process.kill()
        for file in (self._address_file, self._health_file):
            file.unlink()
        flags = list(self._flags)
        flags[flags.index("--listen") + 1] = address
        return type(self)(self.name, self._module, flags, self._environment, self._directory)

    @property
    def address(self) -> str | None:
        """Where it listens; None until it does."""
        return _read(self._address_file)

    def is_ready(self) -> bool:
        """Return whether it has said that it serves."""
        if not self._ready and (health := _read(self._health_file)):
            self._ready = _says_ready(health)
        return self._ready

    def loaded_model(self) -> LoadedModel | None:
        """Return what it has loaded, from its log; None when it does not say."""
        for event in self._events():
            if event.get("event") == "model_loaded":
                return LoadedModel(event["model"], _devices(event), str(event["dtype"]).removeprefix("torch."))
        return None

    def loading_progress(self) -> str:
        """Return how far a model is loaded, such as "120 of 600 MiB"; empty when it does not say."""
        for event in reversed(self._events()):
            if "done_mib" in event and event.get("total_mib"):
                return f"{event['done_mib']} of {event['total_mib']} MiB"
        return ""

    def _events(self) -> list[dict[str, Any]]:
        events = []
        for line in self.process.last_lines(200):
            with suppress(ValueError):
                event = json.loads(line)
                events += [event] if isinstance(event, dict) else []
        return events


def _read(file: Path) -> str | None:
    with suppress(FileNotFoundError):
        return file.read_text()
    return None


def _devices(event: dict[str, Any]) -> str:
    """Return the devices that a model was put on; an LLM service says how many layers each has, as in `cuda:0:14`."""
    shares = str(event.get("layers", "")).split(",")
    return str(event.get("device") or ",".join(share.rpartition(":")[0] for share in shares))


def _says_ready(address: str) -> bool:
    with Client(address) as client, suppress(InternVLError):
        return client.is_ready(timeout_s=1.0)
    return False
