"""The `internvl` command's root, and the command that asks for nothing but a sign of life: `internvl status`."""

import sys
from typing import Final

import typer

from internvl_client.cli import CommandFailure
from internvl_client.cli_gateway import AddressOption, open_client
from internvl_client.cli_output import open_console

_EXAMPLES: Final = """Examples:

  internvl status

  internvl status --address gateway:50051
"""

app = typer.Typer(
    help="InternVL vision-language models, served. Start a system with `internvl up`, ask it with `internvl chat`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Frames only where somebody looks; plain lines for files and pipes.
    rich_markup_mode="rich" if sys.stdout.isatty() and sys.stderr.isatty() else None,
)


@app.command(epilog=_EXAMPLES)
def status(address: AddressOption = None) -> None:
    """Say whether the gateway serves; exit 0 if it does."""
    with open_client(address) as client:
        if not client.is_ready():
            raise CommandFailure(
                f"the gateway at {client.address} runs but is not ready: its models are still loading."
            )
        open_console().print(f"The gateway at {client.address} is ready.")
