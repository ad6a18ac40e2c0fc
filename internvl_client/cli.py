"""The `internvl` command: puts the commands together and turns failures into one line and an exit code."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from internvl_client.errors import InternVLError, OverloadedError, UnavailableError

if TYPE_CHECKING:
    import typer

INSTALL_HINT = "pip install 'internvl-serving[local]'"
# Commands that start the system live above the client; by name, because the client must not need them.
_LOCAL_COMMANDS = "deploy.local.commands"


class CommandFailure(Exception):
    """A command that cannot do what it was asked to; the message says what to do next."""


def main() -> None:
    """Run the command line; exit 0, 1 on failure, 2 on wrong usage, 130 on Ctrl-C."""
    try:
        app = _commands()
    except ModuleNotFoundError as error:
        sys.exit(f"internvl: the command needs {error.name}, which is not installed: {INSTALL_HINT}")
    try:
        app()
    except CommandFailure as failure:
        sys.exit(f"internvl: {failure}")
    except InternVLError as error:
        sys.exit(f"internvl: {describe(error)}")
    except KeyboardInterrupt:
        sys.exit(130)


def describe(error: InternVLError) -> str:
    """Return what went wrong and what to do about it, in one line."""
    advice = ""
    if isinstance(error, UnavailableError) and not error.reason:
        advice = " Start one with `internvl up --model DIR`, or name another with --address HOST:PORT."
    elif isinstance(error, OverloadedError):
        advice = f" Try again in {error.retry_after_s or 1:.0f} s."
    # Without a reason the status is gRPC's own: no server has logged the request id.
    facts = f"{error.reason}, request id {error.request_id}" if error.reason else error.code.name
    return f"{error.message}{advice} [{facts}]"


@cache
def _commands() -> typer.Typer:
    from internvl_client import cli_batch, cli_bench, cli_chat, cli_doctor, cli_media, cli_tiles, cli_top
    from internvl_client.cli_access import add_access_options
    from internvl_client.cli_commands import app

    for commands in (cli_chat, cli_batch, cli_tiles, cli_media, cli_doctor, cli_top, cli_bench):
        commands.register(app)
    import_module(_LOCAL_COMMANDS).register(app)
    add_access_options(app)
    return app


if __name__ == "__main__":
    main()
