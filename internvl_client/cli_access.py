"""The options of every command that reaches a gateway: an API key, and TLS."""

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, TypedDict, get_type_hints

import typer

from internvl_client.access import TlsFiles

_PANEL: Final = "Reaching the gateway"


class ClientOptions(TypedDict):
    """Keyword arguments of `Client` and `AsyncClient`."""

    api_key: str | None
    tls: bool | TlsFiles
    insecure: bool


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What a command was told."""

    api_key: str | None = field(default=None, repr=False)
    tls: bool | TlsFiles = False
    insecure: bool = False


_PLAIN: Final = _Chosen()
_chosen: ContextVar[_Chosen] = ContextVar("access", default=_PLAIN)


def chosen_options() -> ClientOptions:
    """Return what the running command was told about how to reach the gateway."""
    chosen = _chosen.get()
    return ClientOptions(api_key=chosen.api_key, tls=chosen.tls, insecure=chosen.insecure)


def add_access_options(app: typer.Typer) -> None:
    """Give the options to every command with an `address` that lacks them. Call it when all commands are there."""
    for command in app.registered_commands:
        assert command.callback is not None
        parameters = inspect.signature(command.callback).parameters
        if "address" in parameters and not parameters.keys() & inspect.signature(_choose).parameters.keys():
            command.callback = _with_access(command.callback)


def _file(variable: str, text: str) -> Any:
    return typer.Option(
        envvar=variable, exists=True, dir_okay=False, readable=True, help=text, rich_help_panel=_PANEL, metavar="FILE"
    )


def _choose(
    *,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="INTERNVL_API_KEY",
            metavar="KEY",
            help="Says who you are. Better given as the variable: others on this machine can read options.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    tls: Annotated[
        bool,
        typer.Option(
            "--tls", envvar="INTERNVL_TLS", help="Use TLS; the next four mean it too.", rich_help_panel=_PANEL
        ),
    ] = False,
    tls_ca: Annotated[
        Path | None, _file("INTERNVL_TLS_CA", "Who signed the gateway's certificate; else well-known authorities.")
    ] = None,
    tls_cert: Annotated[Path | None, _file("INTERNVL_TLS_CERT", "Certificate to show.")] = None,
    tls_key: Annotated[Path | None, _file("INTERNVL_TLS_KEY", "Its key.")] = None,
    tls_name: Annotated[
        str,
        typer.Option(
            envvar="INTERNVL_TLS_NAME",
            metavar="NAME",
            help="Name in the gateway's certificate, if not the host.",
            rich_help_panel=_PANEL,
        ),
    ] = "",
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            envvar="INTERNVL_INSECURE",
            help="Send the API key unencrypted to another machine.",
            rich_help_panel=_PANEL,
        ),
    ] = False,
) -> None:
    files = TlsFiles(tls_ca, tls_cert, tls_key, tls_name)
    _chosen.set(_Chosen(api_key, files if files != TlsFiles() else tls, insecure))


def _with_access(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Return the command with the options of `_choose` behind its own, which it does not see."""
    own, ours = (inspect.signature(function, eval_str=True) for function in (callback, _choose))

    @functools.wraps(callback)
    def command(**given: Any) -> Any:
        _choose(**{name: given.pop(name) for name in ours.parameters})
        return callback(**given)

    command.__signature__ = own.replace(  # type: ignore[attr-defined]  # what inspect reads first
        parameters=[*own.parameters.values(), *ours.parameters.values()]
    )
    command.__annotations__ = get_type_hints(callback) | get_type_hints(_choose)
    return command
