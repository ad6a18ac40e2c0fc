"""Our own system under measurement, as `internvl up` starts it: processes, with a Valkey server of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.machine import give_core
from benchmarks.peers.peer import PeerError, Report
from deploy.local.stack import LocalStack, PartState, StackError, StackOptions
from internvl_client.async_client import AsyncClient
from internvl_client.bench import GatewayTarget
from internvl_client.bench.gateway_target import OURS

_TIMEOUT_S = 3600.0


class OurSystem:
    """The whole system as a `Peer`. Services' settings come from the environment: `VISION_*`, `LLM_*`, `GATEWAY_*`."""

    name = OURS

    def __init__(self, dtype: str = "bfloat16", device: str = "auto") -> None:
        self._dtype = dtype
        self._device = device
        self._stack: LocalStack | None = None

    @property
    def pids(self) -> tuple[int, ...]:
        """See `Peer`."""
        return tuple(process.pid for process in self._stack.processes.values()) if self._stack else ()

    def separate(self) -> None:
        """Give the LLM service one core, and everything else of the system another."""
        assert self._stack is not None
        for name, process in self._stack.processes.items():
            give_core([process.pid], 0 if name == "llm" else 1)

    def start(self, checkpoint: Path, report: Report) -> str:
        """See `Peer`."""
        self._stack = LocalStack(StackOptions(checkpoint.resolve(), device=self._device, dtype=self._dtype))
        try:
            self._stack.start(_Changes(report))
        except StackError as error:
            self._stack = None
            raise _failure(error) from None
        return self._stack.address

    def restart(self, report: Report) -> str:
        """Kill the LLM service and start it again; what Redis and the vision service hold stays."""
        assert self._stack is not None
        try:
            self._stack.restart("llm", _Changes(report))
        except StackError as error:
            raise _failure(error) from None
        return self._stack.address

    def stop(self) -> None:
        """See `Peer`."""
        if self._stack:
            self._stack.stop()
            self._stack = None

    @asynccontextmanager
    async def connect(self, address: str) -> AsyncIterator[GatewayTarget]:
        """See `Peer`."""
        async with AsyncClient(address, timeout_s=_TIMEOUT_S) as client:
            await client.is_ready()  # opens the connection, which users open once
            yield GatewayTarget(client, self.name, system_message="")


class _Changes:
    """Reports a part's state when it changes."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._shown: dict[str, str] = {}

    def __call__(self, states: Sequence[PartState]) -> None:
        for state in states:
            if self._shown.get(state.name) != state.state:
                self._shown[state.name] = state.state
                self._report(f"{state.seconds:4.0f} s  {state.name} is {state.state}")


def _failure(error: StackError) -> PeerError:
    return PeerError("\n".join([error.message, *(f"  {line[:200]}" for line in error.log_lines)]))
