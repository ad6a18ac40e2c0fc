"""Virtual environments of peers: made once, with exact versions, and never mixed with ours."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.peers.peer import PeerError

ROOT: Final = Path.home() / ".cache" / "internvl-peers"


class Environment:
    """A virtual environment at `directory`; it may not exist yet."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()

    @property
    def python(self) -> Path:
        """The interpreter."""
        return self.directory / "bin" / "python"

    def program(self, name: str) -> Path:
        """Return a program of the environment."""
        return self.directory / "bin" / name

    @property
    def packages(self) -> Path:
        """Where packages are."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.directory / "lib" / version / "site-packages"

    def create(self) -> None:
        """Make it unless it is there; raise `PeerError`."""
        if not self.python.exists():
            say(f"making the virtual environment {self.directory}")
            run([sys.executable, "-m", "venv", str(self.directory)])

    def install(self, *requirements: str) -> None:
        """Install packages with pip; raise `PeerError`."""
        say(f"installing {' '.join(requirements)} (minutes; pip's own words follow)")
        run([str(self.python), "-m", "pip", "install", "--disable-pip-version-check", *requirements])

    def uninstall(self, *packages: str) -> None:
        """Remove packages; those that are not there are left."""
        run([str(self.python), "-m", "pip", "uninstall", "--yes", "--disable-pip-version-check", *packages])

    def execute(self, code: str) -> None:
        """Run Python code in the environment; raise `PeerError` when it fails."""
        run([str(self.python), "-c", code])

    def require(self, program: str, module: str) -> Path:
        """Return a program that has been installed; raise `PeerError` that says how to install it."""
        found = self.program(program)
        if not found.exists():
            raise PeerError(f"{found} is not there. Install it: python -m {module} install --venv {self.directory}")
        return found


def say(text: str) -> None:
    """Tell how far a command is."""
    print(f"==> {text}", flush=True)


def run(command: Sequence[str], directory: Path | None = None) -> None:
    """Run a program and show what it says; raise `PeerError` when it fails."""
    try:
        subprocess.run(command, cwd=directory, check=True)
    except FileNotFoundError:
        raise PeerError(f"there is no program {command[0]}.") from None
    except subprocess.CalledProcessError as error:
        raise PeerError(f"this failed with exit code {error.returncode}: {' '.join(command)}") from None


def parser_of(module: str, description: str, default: Path) -> argparse.ArgumentParser:
    """Return the command line of a peer's module: what to do, and where its environment is."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("action", choices=["install", "serve"], help="serve: run it for --model until Ctrl-C")
    parser.add_argument("--venv", type=Path, default=default, help="its virtual environment (default: %(default)s)")
    parser.add_argument("--model", type=Path, help="checkpoint directory in the -hf layout, for serve")
    return parser
