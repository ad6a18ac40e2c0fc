"""Draws scenes. Only the edges of shapes are drawn larger and shrunk: the rest has none worth it."""

import math
from typing import Final

from PIL import Image, ImageDraw

from examples.nano.world.chance import generator
from examples.nano.world.fonts import font
from examples.nano.world.scene import RING_HOLE, Background, Scene, Thing

_FINER: Final = 3
_STRIPE_PX, _CHECK_PX, _DOT_PX = 12, 16, 14


def draw(scene: Scene) -> Image.Image:
    """Return the picture of a scene, RGB. The same scene always gives the same pixels."""
    picture = _ground(scene.background, scene.width, scene.height)
    for thing in scene.things:
        _draw_thing(picture, thing)
    pen = ImageDraw.Draw(picture)
    for bar in scene.bars:
        pen.rectangle([round(side) for side in bar.box], fill=bar.rgb)
    if scene.bars:
        _draw_axes(pen, scene)
    if scene.writing:
        writing = scene.writing
        face = font(writing.face, writing.size_px)
        pen.text((writing.x, writing.y), writing.text, fill=writing.rgb, font=face)
    return picture


def _draw_thing(picture: Image.Image, thing: Thing) -> None:
    left, top = math.floor(thing.x - thing.radius) - 1, math.floor(thing.y - thing.radius) - 1
    side = math.ceil(2 * thing.radius) + 3
    mask = Image.new("L", (side * _FINER, side * _FINER))
    pen = ImageDraw.Draw(mask)
    if thing.shape in ("circle", "ring"):
        _draw_round(pen, thing, left, top)
    else:
        pen.polygon([((x - left) * _FINER, (y - top) * _FINER) for x, y in thing.outline()], fill=255)
    picture.paste(thing.rgb, (left, top), mask.reduce(_FINER))


def _draw_round(pen: ImageDraw.ImageDraw, thing: Thing, left: int, top: int) -> None:
    box_left, _, box_right, _ = thing.box
    radius = (box_right - box_left) / 2
    for part, fill in ((1.0, 255), (RING_HOLE, 0)):
        if fill or thing.shape == "ring":
            x, y, reach = (thing.x - left) * _FINER, (thing.y - top) * _FINER, radius * part * _FINER
            pen.ellipse((x - reach, y - reach, x + reach, y + reach), fill=fill)


def _draw_axes(pen: ImageDraw.ImageDraw, scene: Scene) -> None:
    left = min(bar.box[0] for bar in scene.bars)
    right = max(bar.box[2] for bar in scene.bars)
    foot = scene.bars[0].box[3]
    colour = (60, 60, 60) if sum(scene.background.first) > 380 else (210, 210, 210)
    pen.line((round(left) - 5, round(foot) + 1, round(right) + 5, round(foot) + 1), fill=colour, width=2)


def _ground(background: Background, width: int, height: int) -> Image.Image:
    if background.style == "clouds":
        return _clouds(background.seed, width, height)
    first = Image.new("RGB", (width, height), background.first)
    if background.style == "plain":
        return first
    mask = _texture(background, width, height)
    first.paste(background.second, (0, 0), mask)
    return first


def _texture(background: Background, width: int, height: int) -> Image.Image:
    """Return where the second colour shows, L."""
    match background.style:
        case "gradient":
            slope = Image.linear_gradient("L")
            return (slope.rotate(90) if background.seed % 2 else slope).resize((width, height))
        case "grain":
            grain = generator(background.seed).integers(0, 256, (height // 2 + 1, width // 2 + 1), dtype="uint8")
            return Image.fromarray(grain).resize((width, height), Image.Resampling.NEAREST)
        case "stripes":
            return _stripes(background.seed, width, height)
        case "checks":
            cells = Image.new("1", (width // _CHECK_PX + 1, height // _CHECK_PX + 1))
            cells.putdata([(x + y) % 2 * 255 for y in range(cells.height) for x in range(cells.width)])
            larger = cells.resize((cells.width * _CHECK_PX, cells.height * _CHECK_PX), Image.Resampling.NEAREST)
            return larger.crop((0, 0, width, height)).convert("L")
        case style:
            raise ValueError(style)


def _stripes(seed: int, width: int, height: int) -> Image.Image:
    mask = Image.new("L", (width, height))
    pen = ImageDraw.Draw(mask)
    lean = (0, height, -height)[seed % 3]
    for x in range(-height, width + height, 2 * _STRIPE_PX):
        pen.line((x, 0, x + lean, height), fill=255, width=_STRIPE_PX)
    return mask


def _clouds(seed: int, width: int, height: int) -> Image.Image:
    """Return soft blots of any colours, which is as near as this world comes to a photograph."""
    blots = generator(seed).integers(0, 256, (5, 6, 3), dtype="uint8")
    return Image.fromarray(blots).resize((width, height), Image.Resampling.BICUBIC)
