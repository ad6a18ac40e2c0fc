"""The command that shows how a picture is cut into tiles: `internvl tiles`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Final

import typer

from internvl_client.cli import INSTALL_HINT, CommandFailure
from internvl_client.cli_gateway import AddressOption, open_client
from internvl_client.cli_output import open_console
from internvl_client.content import DETAIL_TILES, Detail, Image
from internvl_client.terminal_picture import can_show_pictures, show_picture
from internvl_client.tiling_picture import draw_tiles
from internvl_client.types import Estimate

_EXAMPLES: Final = """Examples:

  internvl tiles page.png

  internvl tiles page.png --max-tiles 6 --output tiles.png
"""


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog=_EXAMPLES)(tiles)


def tiles(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="A picture of any size.")],
    max_tiles: Annotated[
        int | None, typer.Option(min=1, help="Most tiles, the thumbnail apart. Default: the model's own.")
    ] = None,
    detail: Annotated[Detail | None, typer.Option(help="OpenAI's word for --max-tiles: low is 6, others 12.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", dir_okay=False, writable=True, help="Write the drawing as a PNG.")
    ] = None,
    address: AddressOption = None,
) -> None:
    """Show the tiles that a picture is cut into, and how many visual tokens they take.

    The gateway is asked, so the grid is the one that a question would get. The terminal shows the drawing where it can.
    """
    if max_tiles is not None and detail is not None:
        raise CommandFailure("give --max-tiles or --detail, not both.")
    console = open_console()
    picture = _read(file, max_tiles if detail is None else DETAIL_TILES[detail])
    with open_client(address) as client:
        found = client.estimate(picture)
    if output is not None or can_show_pictures(console):
        drawn = _drawn(file, picture, found)
        if can_show_pictures(console):
            show_picture(console, drawn)
        if output is not None:
            _write(output, drawn)
    console.print(_summary(file, found))


def _summary(file: Path, found: Estimate) -> str:
    thumbnail = " and a thumbnail" if found.num_tiles > found.columns * found.rows else ""
    return (
        f"{file.name}: {found.width}x{found.height} pixels, {found.columns}x{found.rows} tiles{thumbnail}: "
        f"{found.num_tiles} tiles, {found.num_tokens} visual tokens"
    )


def _read(file: Path, max_tiles: int | None) -> Image:
    try:
        return Image.open(file, max_tiles=max_tiles)
    except OSError as error:
        raise CommandFailure(f"cannot read {file}: {error.strerror}.") from None


def _drawn(file: Path, picture: Image, found: Estimate) -> bytes:
    if find_spec("PIL") is None:
        raise CommandFailure(f"drawing needs Pillow: {INSTALL_HINT}")
    assert picture.content is not None
    try:
        return draw_tiles(picture.content, found)
    except ValueError:
        raise CommandFailure(f"{file} is damaged: its header can be read, and the rest of it cannot.") from None


def _write(output: Path, drawn: bytes) -> None:
    try:
        output.write_bytes(drawn)
    except OSError as error:
        raise CommandFailure(f"cannot write {output}: {error.strerror}.") from None
