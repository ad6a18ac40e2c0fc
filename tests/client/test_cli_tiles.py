"""`internvl tiles` against a scripted gateway, and pictures in a terminal."""

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Picture
from rich.console import Console

from internvl_client.cli_tiles import tiles
from internvl_client.terminal_picture import can_show_pictures, picture_lines, show_picture
from internvl_client.tiling_picture import draw_tiles
from internvl_client.types import Estimate
from tests.client.command_line import run
from tests.client.fake_gateway import FakeGateway

pytestmark = pytest.mark.usefixtures("own_account")
RED = (0xE6, 0x19, 0x4B)


def png(size: tuple[int, int], colour: Any = "gray", mode: str = "RGB", **more: Any) -> bytes:
    buffer = io.BytesIO()
    Picture.new(mode, size, colour).save(buffer, "PNG", **more)
    return buffer.getvalue()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "page.png"
    path.write_bytes(png((640, 480)))
    return path


def terminal(**more: Any) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, color_system="truecolor", width=120, highlight=False, **more
    )


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_tiles_and_tokens_are_said_as_the_gateway_says_them(
    gateway: FakeGateway, picture: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out = run(capsys, monkeypatch, "tiles", picture, "--max-tiles", "12", "--address", gateway.address)
    assert code == 0
    assert out == "page.png: 640x480 pixels, 4x3 tiles and a thumbnail: 13 tiles, 3328 visual tokens\n"
    assert gateway.estimates[0].media.options.max_tiles == 12


def test_the_grid_is_drawn_over_the_picture(
    gateway: FakeGateway, picture: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = picture.with_name("tiles.png")
    arguments = ["tiles", picture, "--detail", "low", "--output", target, "--address", gateway.address]
    assert run(capsys, monkeypatch, *arguments)[0] == 0
    assert gateway.estimates[0].media.options.max_tiles == 6
    drawn = Picture.open(target).convert("RGB")
    assert drawn.size == (640, 480)
    for column in (160, 320, 480):
        assert drawn.getpixel((column, 300)) == RED
    for row in (160, 320):
        assert drawn.getpixel((400, row)) == RED
    assert drawn.getpixel((240, 240)) == (128, 128, 128)


def test_the_grid_of_a_picture_that_the_server_turns_is_drawn_on_the_turned_one() -> None:
    exif = Picture.Exif()
    exif[0x0112] = 6
    content = png((100, 60), exif=exif)
    for width, height in ((100, 60), (60, 100)):
        drawn = draw_tiles(content, Estimate(width, height, 2, 1, 3, 768))
        assert Picture.open(io.BytesIO(drawn)).size == (width, height)


def test_what_cannot_be_drawn_is_said(
    gateway: FakeGateway, picture: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ["--address", gateway.address]
    assert "not both" in run(capsys, monkeypatch, "tiles", picture, "--detail", "low", "--max-tiles", "2", *where)[0]
    nowhere = picture.with_name("nowhere") / "tiles.png"
    assert "cannot write" in run(capsys, monkeypatch, "tiles", picture, "--output", nowhere, *where)[0]
    picture.write_bytes(png((640, 480))[:60])
    assert "is damaged" in run(capsys, monkeypatch, "tiles", picture, "--output", picture, *where)[0]


def test_a_terminal_shows_the_drawing(gateway: FakeGateway, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal()
    monkeypatch.setattr("internvl_client.cli_tiles.open_console", lambda: console)
    tiles(picture, address=gateway.address)
    assert "\u2580" in printed(console)
    assert "13 tiles" in printed(console)


def test_a_picture_is_two_pixels_to_a_character() -> None:
    picture = Picture.new("RGB", (2, 2), "red")
    picture.putpixel((0, 1), (0, 0, 255))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    (line,) = picture_lines(buffer.getvalue(), 40, 20)
    first, second = (span.style for span in line.spans)
    assert (str(line), str(first), str(second)) == ("\u2580\u2580", "#ff0000 on #0000ff", "#ff0000 on #ff0000")


@pytest.mark.parametrize(
    ("size", "expected"), [((400, 100), (40, 5)), ((100, 400), (10, 20)), ((2, 2), (2, 1)), ((4000, 2), (40, 1))]
)
def test_a_picture_fits_and_keeps_its_shape(size: tuple[int, int], expected: tuple[int, int]) -> None:
    lines = picture_lines(png(size), 40, 20)
    assert (len(str(lines[0])), len(lines)) == expected


def test_what_is_transparent_is_white() -> None:
    (line,) = picture_lines(png((1, 2), (0, 0, 0, 0), "RGBA"), 10, 10)
    assert str(line.spans[0].style) == "#ffffff on #ffffff"


def test_bytes_that_are_no_picture_are_refused() -> None:
    with pytest.raises(ValueError, match="no picture"):
        show_picture(terminal(), b"no picture")


def test_pictures_are_shown_only_where_they_can_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_show_pictures(terminal())
    assert not can_show_pictures(Console(file=io.StringIO()))
    assert not can_show_pictures(terminal(no_color=True))
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert not can_show_pictures(Console(file=ascii_only, force_terminal=True, color_system="truecolor"))
    monkeypatch.setenv("TERM", "dumb")
    assert not can_show_pictures(Console(file=io.StringIO(), force_terminal=True))
