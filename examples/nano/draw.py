"""Draws the pictures of the demo, with questions and right answers: `python -m examples.nano.draw`."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from examples.nano.world import Bar, Scene, Thing, Writing, draw
from examples.nano.world.fonts import ink_box
from examples.nano.world.scene import Background
from examples.nano.world.vocabulary import COLOURS

DIRECTORY: Final = Path(__file__).parent / "pictures"
QUESTIONS_FILE: Final = "questions.json"
_WIDTH, _HEIGHT = 400, 300
_PAPER = Background("plain", (250, 247, 240), (250, 247, 240))
_DUSK = Background("gradient", (44, 46, 66), (66, 68, 88))
_STEEL = Background("stripes", (222, 230, 240), (206, 214, 226))


@dataclass(frozen=True, slots=True)
class Demo:
    """Pictures by file name, and a dialogue about them: questions with the answers that are right.

    `label` comes before each picture, with its number; `max_tiles` None leaves the tiling to the model.
    """

    pictures: dict[str, Scene]
    dialogue: tuple[tuple[str, str], ...]
    label: str = ""
    max_tiles: int | None = None


def demos() -> list[Demo]:
    """Return everything that the demo shows."""
    shapes = _things(_PAPER, _thing("star", "red", 70, 62, 44), _thing("circle", "blue", 330, 70, 46))
    shapes = replace(shapes, things=(*shapes.things, _thing("heart", "green", 200, 235, 48)))
    before = _things(_STEEL, _thing("triangle", "purple", 200, 150, 60))
    after = _things(_STEEL, _thing("triangle", "orange", 200, 150, 60))
    frames = [
        _things(_DUSK, _thing("ring", "yellow", 70 + 85 * index, 200, 42), _thing("square", "pink", 210, 60, 42))
        for index in range(4)
    ]
    return [
        Demo(
            {"shapes.png": shapes},
            (
                ("What is in the picture?", "a red star, a green heart and a blue circle"),
                ("Where is the circle?", "top right"),
                ("And what colour is it?", "blue"),
            ),
        ),
        Demo({"number.png": _writing("4821", "blue", 76, _PAPER)}, (("What number is this?", "4821"),)),
        Demo({"word.png": _writing("ship", "orange", 84, _DUSK)}, (("What word is this?", "ship"),)),
        Demo({"chart.png": _chart()}, (("Which bar is the tallest?", "green"), ("And the shortest?", "purple"))),
        Demo(
            {"before.png": before, "after.png": after},
            (("Which image shows an orange shape?", "Image-2"), ("What colour is the triangle in Image-1?", "purple")),
            label="Image-{}: ",
        ),
        Demo(
            {f"frame-{index}.png": frame for index, frame in enumerate(frames, start=1)},
            (("Which way does the ring move?", "right"),),
            label="Frame{}: ",
            max_tiles=1,
        ),
    ]


def main() -> None:
    """Write the pictures, and the dialogues as JSON."""
    DIRECTORY.mkdir(exist_ok=True)
    found = demos()
    for demo in found:
        for name, scene in demo.pictures.items():
            draw(scene).save(DIRECTORY / name, optimize=True)
    content = [
        {
            "pictures": list(demo.pictures),
            "label": demo.label,
            "max_tiles": demo.max_tiles,
            "dialogue": [{"question": question, "answer": answer} for question, answer in demo.dialogue],
        }
        for demo in found
    ]
    (DIRECTORY / QUESTIONS_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _things(background: Background, *things: Thing) -> Scene:
    return Scene(_WIDTH, _HEIGHT, background, things)


def _thing(shape: str, colour: str, x: float, y: float, radius: float) -> Thing:
    return Thing(shape, colour, COLOURS[colour], x, y, radius)


def _writing(text: str, colour: str, size_px: int, background: Background) -> Scene:
    face = "lato-bold"
    left, top, right, bottom = ink_box(text, face, size_px)
    x, y = round((_WIDTH - right - left) / 2), round((_HEIGHT - bottom - top) / 2)
    box = (left + x, top + y, right + x, bottom + y)
    return Scene(_WIDTH, _HEIGHT, background, (), Writing(text, colour, COLOURS[colour], face, size_px, x, y, box))


def _chart() -> Scene:
    heights = {"red": 120, "green": 220, "purple": 50, "orange": 160}
    bars = tuple(
        Bar(colour, COLOURS[colour], (55 + 75 * index, 264 - height, 105 + 75 * index, 264))
        for index, (colour, height) in enumerate(heights.items())
    )
    return Scene(_WIDTH, _HEIGHT, _PAPER, (), None, bars)


if __name__ == "__main__":
    main()
