"""The commands about media without a question: `internvl prefetch` and `internvl estimate`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from internvl_client.cli import CommandFailure, describe
from internvl_client.cli_gateway import AddressOption, open_client
from internvl_client.cli_output import open_console
from internvl_client.content import Image, Media, Video
from internvl_client.errors import InternVLError, InvalidRequestError
from internvl_client.media_paths import is_video
from internvl_client.types import Estimate, Receipt

_PREFETCH_EXAMPLES: Final = """Examples:

  internvl prefetch *.jpg clip.mp4

  internvl prefetch --max-tiles 6 *.jpg
"""
_ESTIMATE_EXAMPLES: Final = """Examples:

  internvl estimate *.jpg
"""
_GROUP_BYTES: Final = 64 << 20  # of files that are in memory at a time

MediaArgument = Annotated[
    list[Path],
    typer.Argument(exists=True, dir_okay=False, readable=True, help="Pictures, and videos by the end of their name."),
]
PicturesArgument = Annotated[
    list[Path], typer.Argument(exists=True, dir_okay=False, readable=True, help="Pictures of any size.")
]
MaxTilesOption = Annotated[
    int | None, typer.Option(min=1, help="Most tiles a picture or frame is cut into, as in the questions to come.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog=_PREFETCH_EXAMPLES)(prefetch)
    app.command(epilog=_ESTIMATE_EXAMPLES)(estimate)


def prefetch(files: MediaArgument, max_tiles: MaxTilesOption = None, address: AddressOption = None) -> None:
    """Have pictures and videos encoded before anybody asks about them; exit 1 if one cannot be.

    Whatever somebody waits for comes first. Of a video, the frames are those that are seen where nothing else is asked.
    """
    console = open_console()
    failures = _Failures(console, len(files))
    receipts: list[Receipt] = []
    with open_client(address) as client, _progress_bar(console, len(files)) as show_progress:
        for group in _groups(files, max_tiles, failures):
            on_progress = partial(show_progress, len(receipts) + failures.count)
            outcomes = client.prefetch([medium for _, medium in group], on_progress=on_progress)
            for (path, _), outcome in zip(group, outcomes, strict=True):
                if isinstance(outcome, InternVLError):
                    failures.add(path, describe(outcome))
                else:
                    receipts.append(outcome)
    console.print(_summary(receipts))
    failures.check()


def estimate(files: PicturesArgument, max_tiles: MaxTilesOption = None, address: AddressOption = None) -> None:
    """Say how many tiles and visual tokens pictures will take, without decoding them; exit 1 if one has none."""
    console = open_console()
    failures = _Failures(console, len(files))
    width = max(len(str(path)) for path in files)
    with open_client(address) as client:
        console.print(_row("file", width, "size", "grid", "tiles", "tokens"), style="bold")
        for path in files:
            try:
                found = client.estimate(Image.open(path, max_tiles=max_tiles))
            except OSError as error:
                failures.add(path, _unreadable(error))
            except InvalidRequestError as error:
                failures.add(path, describe(error))
            else:
                console.print(_estimate_row(path, width, found))
    failures.check()


class _Failures:
    """Prints a line for each file that failed, and counts them."""

    def __init__(self, console: Console, num_files: int) -> None:
        self._console = console
        self._num_files = num_files
        self.count = 0

    def add(self, path: Path, what: str) -> None:
        self.count += 1
        self._console.print(f"{path}: {what}")

    def check(self) -> None:
        """Raise `CommandFailure` if there was one."""
        if self.count:
            raise CommandFailure(f"{self.count} of {self._num_files} failed.")


def _groups(files: Sequence[Path], max_tiles: int | None, failures: _Failures) -> Iterator[list[tuple[Path, Media]]]:
    """Yield the files' media, so many at a time as may be in memory."""
    group: list[tuple[Path, Media]] = []
    num_bytes = 0
    for path in files:
        try:
            medium = _open(path, max_tiles)
        except OSError as error:
            failures.add(path, _unreadable(error))
            continue
        group.append((path, medium))
        num_bytes += len(medium.content or b"")
        if num_bytes >= _GROUP_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _open(path: Path, max_tiles: int | None) -> Media:
    kind = Video if is_video(path) else Image
    return kind.open(path, max_tiles=max_tiles)


def _unreadable(error: OSError) -> str:
    return f"cannot be read: {error.strerror}."


@contextmanager
def _progress_bar(console: Console, num_files: int) -> Iterator[Callable[[int, int, int], None]]:
    """Yield what shows that so many files had ended before a group, and so many of that have."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=num_files)
        yield lambda before, done, _: progress.update(task, completed=before + done)


def _summary(receipts: Sequence[Receipt]) -> str:
    num_encoded = sum(not receipt.cache_hit for receipt in receipts)
    num_tokens = sum(receipt.num_tokens for receipt in receipts)
    return (
        f"{len(receipts)} ready ({num_encoded} encoded, {len(receipts) - num_encoded} in caches already), "
        f"{num_tokens} visual tokens."
    )


def _estimate_row(path: Path, width: int, found: Estimate) -> str:
    size, grid = f"{found.width}x{found.height}", f"{found.columns}x{found.rows}"
    return _row(str(path), width, size, grid, str(found.num_tiles), str(found.num_tokens))


def _row(name: str, width: int, size: str, grid: str, tiles: str, tokens: str) -> str:
    return f"{name:<{width}}  {size:>11}  {grid:>5}  {tiles:>5}  {tokens:>6}"
