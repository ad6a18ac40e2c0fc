"""The commands that run the system on this machine: `internvl up` and `internvl demo`."""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Annotated, Final, Literal

import typer
from rich.console import Console

from deploy.local.demo import DEFAULT_MODEL, NANO, of_drawn_pictures, of_picture, show
from deploy.local.display import showing_progress
from deploy.local.stack import LocalStack, StackError, StackOptions
from internvl_client.cli import INSTALL_HINT, CommandFailure
from internvl_client.cli_gateway import AddressOption, open_client
from internvl_client.cli_output import open_console
from internvl_client.cli_session import ChatSession
from internvl_client.running import RunningSystem, announce, find_running, withdraw
from internvl_client.types import GenerationConfig

_DEMO_CONFIG: Final = GenerationConfig(max_output_tokens=48)
_NEEDED: Final = ("torch", "transformers", "safetensors", "redis", "PIL")

_CHECKPOINT_HELP: Final = "Checkpoint directory: config.json, safetensors, tokenizer."
_DEVICE_HELP: Final = (
    "auto, cpu, cuda or cuda:N; or GPUs that share the language model's layers, as in cuda:0,cuda:1: "
    "the vision tower is on the first."
)
_USUAL_HTTP: Final = "127.0.0.1:8000"  # where clients of such servers look first
_HTTP_HELP: Final = (
    "Where the gateway answers HTTP, which is OpenAI's API; empty: nowhere. "
    "Default: 127.0.0.1:8000, or a free port where that is taken."
)
_UP_EXAMPLES: Final = """Examples:

  internvl up --model /models/InternVL3-1B

  internvl up --model /models/InternVL3-8B --device cuda:0,cuda:1 --listen 127.0.0.1:0
"""
_DEMO_EXAMPLES: Final = """Examples:

  internvl demo

  internvl demo --image cat.jpg
"""
DeviceOption = Annotated[str, typer.Option(help=_DEVICE_HELP)]
DtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: float32 on a CPU, bfloat16 on a GPU.")
]
LogsOption = Annotated[
    Path | None, typer.Option(file_okay=False, help="Keep the services' logs here. Otherwise they go when all stops.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog=_UP_EXAMPLES)(up)
    app.command(epilog=_DEMO_EXAMPLES)(demo)


def up(
    model: Annotated[Path, typer.Option(exists=True, file_okay=False, help=_CHECKPOINT_HELP)],
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the gateway listens.")] = "127.0.0.1:50051",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    critic: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Checkpoint of a critic (VisualPRM) that ranks candidates."),
    ] = None,
    logs: LogsOption = None,
    http_listen: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help=_HTTP_HELP),
    ] = None,
) -> None:
    """Run the whole system here, for any checkpoint, until Ctrl-C.

    Whatever else the services can be told goes through their environment variables: VISION_*, LLM_*, GATEWAY_*.
    """
    console = open_console()
    options = StackOptions(
        model.resolve(),
        listen,
        device,
        dtype,
        logs,
        critic=critic.resolve() if critic else None,
        http_listen=_USUAL_HTTP if http_listen is None else http_listen,
        http_port_fallback=http_listen is None,
        metrics=True,
    )
    try:
        with _interrupted_by_signals(), _running(console, options) as system:
            note = RunningSystem(system.address, str(options.model), os.getpid(), system.metrics)
            with _announced(note):
                _show_system(console, system)
                system.wait()
    except KeyboardInterrupt:
        return  # that is how it ends


def demo(
    model: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help=f"{_CHECKPOINT_HELP} Default: InternVL-nano, or a tiny one."),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Ask about this picture, not about drawn ones.")
    ] = None,
    address: AddressOption = None,
) -> None:
    """Ask about pictures, several turns each, and show what each answer cost.

    Uses the system at --address, or the one that `internvl up` runs here; otherwise starts one and stops it at the end.
    """
    console = open_console()
    found = None if model or address else find_running()
    with ExitStack() as stack:
        if address or found:
            target, directory = address or str(found and found.address), Path(found.model) if found else None
            console.print(f"Using the system that runs at {target}.")
        else:
            directory = (model or DEFAULT_MODEL).resolve()
            stack.enter_context(_interrupted_by_signals())
            target = stack.enter_context(_running(console, StackOptions(directory))).address
        if directory == DEFAULT_MODEL != NANO:
            console.print("This model is tiny and its weights are random: expect nonsense. What counts is the way.")
        client = stack.enter_context(open_client(target))
        dialogues = of_picture(image) if image else of_drawn_pictures(answered=directory == NANO)
        show(console, client, ChatSession(console, _DEMO_CONFIG), dialogues)


@contextmanager
def _running(console: Console, options: StackOptions) -> Iterator[LocalStack]:
    """Run the system while the context lasts; raise `CommandFailure` when a part of it fails."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise CommandFailure(f"running the services needs {', '.join(missing)}: {INSTALL_HINT}")
    system = LocalStack(options)
    try:
        console.print(f"Starting {options.model.name}; logs are in {system.directory}")
        with showing_progress(console) as report:
            system.start(report)
        yield system
    except StackError as error:
        for line in error.log_lines:
            console.print(f"  {line}", style="dim")
        raise CommandFailure(error.message) from None
    except KeyboardInterrupt:
        console.print("\nStopping.")
        raise
    finally:
        system.stop()


@contextmanager
def _announced(note: RunningSystem) -> Iterator[None]:
    announce(note)
    try:
        yield
    finally:
        withdraw(note)


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Make a request to stop, or a closed terminal, what Ctrl-C is."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show_system(console: Console, system: LocalStack) -> None:
    sizes = {name: process.memory_bytes >> 20 for name, process in system.processes.items()}
    model = system.model
    facts = {
        "gateway": system.address,
        "openai": f"http://{system.http_address}/v1" if system.http_address else "off",
        "model": model.name if model else "unknown",
        "device": f"{model.device}, {model.dtype}" if model else "unknown",
        "memory": f"{sum(sizes.values())} MiB ({', '.join(f'{name} {size}' for name, size in sizes.items())})",
        "logs": str(system.directory),
    }
    for label, text in facts.items():
        console.print(f"  {label:<8} {text}")
    console.print('Ask it:    internvl chat --image FILE "What is in the picture?"')
    console.print("Watch it:  internvl top\nCtrl-C ends it.")
