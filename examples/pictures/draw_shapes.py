"""Draws shapes.png, the picture of the demo: `python examples/pictures/draw_shapes.py`. Needs Pillow."""

from pathlib import Path

from PIL import Image, ImageDraw

SCALE = 4  # drawn larger and shrunk, so that edges are smooth
WIDTH, HEIGHT = 640, 480


def draw() -> Image.Image:
    """Return a sun, a house, a tree and a ball on a meadow."""
    picture = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "#bfe3ff")
    pen = ImageDraw.Draw(picture)

    def scaled(*numbers: int) -> list[int]:
        return [number * SCALE for number in numbers]

    pen.rectangle(scaled(0, 340, 640, 480), fill="#7cc36a")
    pen.ellipse(scaled(500, 40, 600, 140), fill="#ffd23f")
    pen.rectangle(scaled(90, 210, 270, 380), fill="#f4ead5")
    pen.polygon(scaled(70, 210, 180, 110, 290, 210), fill="#d1495b")
    pen.rectangle(scaled(155, 290, 205, 380), fill="#6b4226")
    pen.rectangle(scaled(110, 240, 145, 275), fill="#5aa9e6")
    pen.rectangle(scaled(215, 240, 250, 275), fill="#5aa9e6")
    pen.rectangle(scaled(410, 270, 435, 390), fill="#6b4226")
    pen.ellipse(scaled(350, 150, 495, 300), fill="#2e8b57")
    pen.ellipse(scaled(290, 380, 350, 440), fill="#3454d1")
    return picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    draw().save(Path(__file__).with_name("shapes.png"), optimize=True)
