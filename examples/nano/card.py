"""Writes the model card: what the model is, how right it is, how it was trained, with its learning curve.

`python -m examples.nano.card DIRECTORY` writes it again from training.json and evaluation.json, which lie beside it.
"""

import json
import sys
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageDraw, ImageFont

from examples.nano.accuracy import REQUIRED, REQUIRED_IOU
from examples.nano.world import Kind

TRAINING_FILE: Final = "training.json"
EVALUATION_FILE: Final = "evaluation.json"
CURVE_FILE: Final = "learning-curve.png"
_WIDTH, _HEIGHT, _MARGIN = 900, 420, 56
_MEANING: Final = {
    Kind.SHAPE: "the shape of a thing",
    Kind.COLOUR: "the colour of a thing",
    Kind.OBJECT: "what is at one of nine places",
    Kind.DESCRIBE: "everything in the picture",
    Kind.COUNT: "how many there are, 0 to 5",
    Kind.POSITION: "which of nine places",
    Kind.PRESENCE: "whether something is there",
    Kind.NUMBER: "a number of up to four digits",
    Kind.DIGIT: "one digit of it, or how many",
    Kind.WORD: "a word of a list",
    Kind.CHART: "bars: tallest, shortest, how many",
    Kind.COMPARE: "two pictures",
    Kind.COMPARE_THREE: "three pictures",
    Kind.DIRECTION: "which way something moves in a clip",
    Kind.CHANGE: "what happens in a clip",
    Kind.FRAME: "one frame of a clip",
    Kind.FOLLOW_UP: "questions that need the history",
    Kind.GROUNDING: "boxes, all four sides exact",
    Kind.ABSENT: "things that are not there",
    Kind.REFUSAL: "what it cannot see or know",
    Kind.TALK: "small talk",
}


def write_card(directory: Path) -> None:
    """Write README.md and the learning curve from training.json and, if it is there, evaluation.json."""
    training = _read(directory / TRAINING_FILE)
    evaluated = directory / EVALUATION_FILE
    evaluation = _read(evaluated) if evaluated.is_file() else None
    draw_curve(training["history"]).save(directory / CURVE_FILE, optimize=True)
    (directory / "README.md").write_text(_card(training, evaluation), encoding="utf-8")


def draw_curve(history: list[dict[str, Any]]) -> Image.Image:
    """Return accuracy, box overlap and loss over the hours of training."""
    picture = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    pen = ImageDraw.Draw(picture)
    face = ImageFont.load_default(14)
    last = max([point["seconds"] for point in history] or [1]) or 1
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _y(share)
        pen.line((_MARGIN, y, _WIDTH - _MARGIN, y), fill="#dddddd")
        pen.text((_MARGIN - 8, y), f"{share:.0%}", fill="#444444", font=face, anchor="rm")
    top_loss = max([point["loss"] for point in history] or [1]) or 1
    lines = (
        ("overall", 1.0, "#1f5fbf", "accuracy"),
        ("iou", 1.0, "#2c963c", "box overlap"),
        ("loss", top_loss, "#c03030", ""),
    )
    for index, (name, scale, colour, label) in enumerate(lines):
        points = [(_MARGIN + (_WIDTH - 2 * _MARGIN) * p["seconds"] / last, _y(p[name] / scale)) for p in history]
        if len(points) > 1:
            pen.line(points, fill=colour, width=2)
        label = label or f"loss (top is {top_loss:.1f})"
        pen.text((_MARGIN + 190 * index, 16), label, fill=colour, font=face)
    pen.text((_WIDTH - _MARGIN, _HEIGHT - 24), f"{last / 3600:.1f} hours", fill="#444444", font=face, anchor="ra")
    return picture


def _y(share: float) -> float:
    return _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * min(1.0, max(0.0, share))


def _card(training: dict[str, Any], evaluation: dict[str, Any] | None) -> str:
    measured = evaluation or training["in_process"]
    how = (
        "through the running system (gateway, vision service, LLM service)"
        if evaluation
        else "in the training process; `examples.nano.evaluate` measures it through the running system"
    )
    return _TEXT.format(
        parameters=training["parameters"] / 1e6,
        megabytes=training["parameters"] * 2 / 1e6,
        how=how,
        asked=measured["asked"],
        seed=training["held_out_seed"],
        overall=measured["overall"],
        table=_table(measured),
        iou=measured["grounding_mean_iou"],
        required_iou=REQUIRED_IOU,
        weak=_weak(measured),
        **{
            name: training[name]
            for name in (
                *("situations", "answers", "steps", "hours", "machine", "shape"),
                *("seeing", "easy", "answering", "learning_rate"),
            )
        },
        training_seed=training["seed"],
        grow=f" --grow {training['grow']}" if training.get("grow") else "",
        grown=_GROWN if training.get("grow") else "",
    )


def _table(measured: dict[str, Any]) -> str:
    rows = ["| kind | asks for | questions | right | wanted |", "| --- | --- | --- | --- | --- |"]
    for kind in Kind:
        if found := measured["kinds"].get(str(kind)):
            wanted = f"{REQUIRED[kind]:.0%}" if kind in REQUIRED else ""
            rows.append(f"| {kind} | {_MEANING[kind]} | {found['asked']} | {found['accuracy']:.1%} | {wanted} |")
    return "\n".join(rows)


def _weak(measured: dict[str, Any]) -> str:
    kinds = {kind: found["accuracy"] for kind, found in measured["kinds"].items() if kind != str(Kind.GROUNDING)}
    worst = sorted(kinds, key=lambda kind: kinds[kind])[:4]
    return ", ".join(f"{kind} ({1 - kinds[kind]:.1%} wrong)" for kind in worst)


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


_TEXT: Final = """\
# InternVL-nano

A very small InternVL ({parameters:.1f} million parameters, {megabytes:.1f} MB in bfloat16), trained from scratch on
pictures that a program draws. It exists so that this repository can show, and test, a model that really sees. It is no
use for anything else.

Layout: the released one (`InternVLChatModel`, template `internvl2_5`, Qwen2 language model). Tiles have 112 pixels and
give 16 visual tokens; a picture gets up to 4 tiles and a thumbnail.

## What it knows

One to five coloured shapes (8 shapes, 10 colours; in three of four pictures up to three), numbers of up to four digits,
a list of short words, bar charts of three to five bars, two or three pictures compared, clips of three to five frames.
It answers in few words: a colour, a shape, a number, one of nine places ("top left" to "bottom right"), "yes", "no",
"Image-2", "Frame3". Asked for what lies outside, it says "I cannot see that."

## How right it is

Exact answers, greedy decoding, {asked} questions of a seed that it was never trained on ({seed}), measured {how}.
Overall (without boxes): {overall:.1%}. Boxes: mean intersection over union {iou:.2f} (wanted: {required_iou}).

{table}

What it gets wrong most often: {weak}.

It does not know photographs, other fonts, other words or questions put in quite other ways: there it will say
something wrong, in the same few words. Its world has no people, so it has learned nothing about them.

## How it was trained

{steps:,} steps on {situations:,} situations (pictures with several dialogues about each) with {answers:,} answers. The
first {seeing:,} steps were on crowded pictures without any words, and so was every fourth step later. All along a layer
that is not part of the model read from the visual tokens what each patch shows, which only a drawn world can tell. In
the last {answering:,} steps the vision transformer was left as it was; the rest learned alone{grown}.
It took {hours:.1f} hours on {machine}. Again, from the repository's root:

    python -m examples.nano.train --shape {shape}{grow} --seed {training_seed} --steps {steps} --seeing {seeing} \\
        --easy {easy} --answering {answering} --learning-rate {learning_rate}

![Learning curve](learning-curve.png)

Everything in its pictures is drawn by `examples/nano/world`; the fonts are Lato, Source Serif Pro (SIL Open Font
License) and Aileron (public domain). The licence of the weights is that of the repository.
"""


_GROWN: Final = ", after the language model\nhad grown: wider and deeper, but computing the same"


if __name__ == "__main__":
    write_card(Path(sys.argv[1]))
