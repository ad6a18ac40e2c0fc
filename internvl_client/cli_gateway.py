"""How commands reach a gateway: which one, and the clients that talk to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from internvl_client.async_client import AsyncClient
from internvl_client.cli import CommandFailure
from internvl_client.cli_access import chosen_options
from internvl_client.client import Client
from internvl_client.running import find_running

AddressOption = Annotated[
    str | None,
    typer.Option(
        envvar="INTERNVL_ADDRESS",
        metavar="HOST:PORT",
        help="The gateway. Without it: the system that `internvl up` runs on this machine.",
    ),
]


def find_address(given: str | None) -> str:
    """Return the gateway's address: the one given, or that of the system running here."""
    if given:
        return given
    system = find_running()
    if system is None:
        raise CommandFailure(
            "nothing runs here. Start a system with `internvl up --model DIR`, "
            "or name a gateway with --address HOST:PORT (or INTERNVL_ADDRESS)."
        )
    return system.address


def open_client(address: str | None, timeout_s: float | None = None) -> Client:
    """Return a client of the gateway at `address`, or of the system running here; close it."""
    with _usable_options():
        return Client(find_address(address), timeout_s=timeout_s, **chosen_options())


def open_async_client(address: str | None, timeout_s: float | None = None) -> AsyncClient:
    """Return what `open_client` does, for asyncio."""
    with _usable_options():
        return AsyncClient(find_address(address), timeout_s=timeout_s, **chosen_options())


@contextmanager
def _usable_options() -> Iterator[None]:
    """Raise what is wrong with a key or with files of certificates as `CommandFailure`."""
    try:
        yield
    except OSError as error:
        raise CommandFailure(f"cannot read {error.filename}: {error.strerror}.") from None
    except ValueError as error:
        raise CommandFailure(str(error)) from None
