"""Fetches the pictures that Pillow's own tests read, crash and timeout reports among them, from its source package."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

VERSION = "13.0.0"
_TIMEOUT_S = 300


class CorpusMissing(Exception):
    """The corpus is not in the cache and cannot be fetched; the message says why."""


def pillow_images() -> list[Path]:
    """Return the pictures, from a folder outside of the repository; raises `CorpusMissing`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "internvl-serving/corpora"
    archive = cache / f"pillow-{VERSION}.tar.gz"
    images = cache / f"pillow-{VERSION}/Tests/images"
    if not archive.exists():
        _download(cache)
    if not images.exists():
        with tarfile.open(archive) as source:
            wanted = [member for member in source if "/Tests/images/" in member.name]
            source.extractall(cache, members=wanted, filter="data")
    return sorted(path for path in images.rglob("*") if path.is_file())


def _download(cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "0"]
    command += ["--no-deps", "--no-binary", "pillow", "--dest", str(cache), f"pillow=={VERSION}"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise CorpusMissing(f"pip has not downloaded Pillow's source package within {_TIMEOUT_S} seconds") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()
        raise CorpusMissing(
            f"pip cannot download Pillow's source package: {said[-1] if said else 'no reason given'}"
        ) from None
