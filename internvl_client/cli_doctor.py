"""The command that looks at a system and says what is wrong with it: `internvl doctor`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Final

import typer
from grpc import StatusCode
from rich.console import Console

from internvl_client.cli import CommandFailure, describe
from internvl_client.cli_gateway import AddressOption, open_client
from internvl_client.cli_output import open_console
from internvl_client.client import Client
from internvl_client.diagnosis import Asked, Finding, Level, diagnose
from internvl_client.errors import InternVLError, UnauthenticatedError

_EXAMPLES: Final = """Examples:

  internvl doctor

  internvl doctor --address gateway:50051 --json
"""
_COLOURS: Final = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog=_EXAMPLES)(doctor)


def doctor(
    address: AddressOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that the gateway gets for an answer.")] = 15.0,
) -> None:
    """Look at a system and say what is well, what may become a trouble and what is one; exit 1 if something is.

    Asks the gateway how it is, and through it the vision and LLM services and the stores. Each line that is not well
    says what to do next.
    """
    console = open_console()
    with open_client(address, timeout) as client:
        findings = examine(client)
    if as_json:
        console.print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _show(console, findings)
    failed = sum(finding.level is Level.FAIL for finding in findings)
    if failed:
        raise CommandFailure(f"{failed} of {len(findings)} checks failed.")


def examine(client: Client) -> list[Finding]:
    """Return the findings about the system behind a client; those that cannot be reached are findings, too."""
    try:
        is_ready = client.is_ready()
    except InternVLError as error:
        return [Finding("gateway", Level.FAIL, f"no answer at {client.address}", describe(error))]
    if not is_ready:
        advice = "it waits for an LLM service: see its log, and whether its --llm-target is right."
        return [Finding("gateway", Level.FAIL, f"{client.address} is not ready", advice)]
    found = [Finding("gateway", Level.OK, f"{client.address} is ready")]
    sent = datetime.now(UTC)
    try:
        status = client.status()
    except UnauthenticatedError as error:
        return [*found, Finding("access", Level.FAIL, error.message, "set INTERNVL_API_KEY to a key that is valid.")]
    except InternVLError as error:
        level = Level.WARN if error.code is StatusCode.UNIMPLEMENTED else Level.FAIL  # an older release
        return [*found, Finding("status", level, "the gateway does not say how it is", describe(error))]
    return found + diagnose(status, Asked(sent, datetime.now(UTC), _own_version()))


def _show(console: Console, findings: Sequence[Finding]) -> None:
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        console.print(f"{finding.level:<4}", style=_COLOURS[finding.level], end="  ")
        console.print(f"{finding.subject:<{width}}  {finding.fact}")
        if finding.advice:
            console.print(f"{'':<{width + 8}}{finding.advice}", style="dim")


def _own_version() -> str:
    with suppress(PackageNotFoundError):
        return version("internvl-serving")
    return ""
