"""Composes scenes by chance: shapes, writing, bar charts, clips."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from examples.nano.world.chance import Rng, between, chance, pick, shuffled, weighted
from examples.nano.world.config import WorldConfig
from examples.nano.world.fonts import FACES, ink_box
from examples.nano.world.scene import Background, Bar, Scene, Thing, Writing
from examples.nano.world.vocabulary import COLOURS, DIRECTIONS, Rgb

_GROUNDS: tuple[Rgb, ...] = (
    *((250, 250, 250), (236, 236, 230), (222, 232, 244), (250, 236, 220), (226, 242, 226), (244, 226, 236)),
    *((196, 196, 196), (150, 156, 164), (96, 100, 108), (44, 46, 54), (16, 24, 52), (34, 52, 40)),
)
_TEXTURES = ("gradient", "stripes", "checks", "grain")
_CONTRAST = 95.0
_TEXTURE_DIFFERENCE = 22
_ANGLES = {"star": 36.0, "triangle": 10.0, "heart": 10.0, "square": 7.0, "cross": 7.0, "diamond": 5.0}
# A thing's largest diameter, as a part of the shorter side, by how many things there are.
_LARGEST = (0.70, 0.70, 0.50, 0.42, 0.36, 0.32)


@dataclass(frozen=True, slots=True)
class Canvas:
    """An empty picture."""

    width: int
    height: int
    background: Background

    def scene(self) -> Scene:
        """Return the scene with nothing in it."""
        return Scene(self.width, self.height, self.background)


def canvas(rng: Rng, config: WorldConfig, *, large_share: float | None = None) -> Canvas:
    """Return an empty picture of any size, proportions and background."""
    large = chance(rng, config.large_share if large_share is None else large_share)
    root = between(rng, config.large_px if large else config.small_px)
    stretch = math.exp(between(rng, (-0.5, 0.5)) * math.log(config.max_aspect))
    return Canvas(round(root * stretch), round(root / stretch), background(rng, config))


def shapes_scene(rng: Rng, config: WorldConfig, on: Canvas, count: int | None = None) -> Scene:
    """Return a scene of things; `count` is the number tried for, and one is there at least."""
    wanted = count or 1 + weighted(rng, config.count_weights[: config.max_things])
    colours, shapes = _names(rng, config, on.background, wanted)
    things: list[Thing] = []
    for _ in range(wanted):
        thing = _placed(rng, config, on, things, wanted, colours, shapes)
        if thing is not None:
            things.append(thing)
    return replace(on.scene(), things=tuple(things)) if things else shapes_scene(rng, config, on, 1)


def number_scene(rng: Rng, config: WorldConfig, on: Canvas) -> Scene:
    """Return a scene with a number of up to `max_digits` digits."""
    digits = 1 + int(rng.integers(config.max_digits))
    lowest = 10 ** (digits - 1) if digits > 1 else 0
    return written_scene(rng, config, on, str(int(rng.integers(lowest, 10**digits))))


def word_scene(rng: Rng, config: WorldConfig, on: Canvas) -> Scene:
    """Return a scene with a word, in small or capital letters."""
    word = pick(rng, config.words)
    return written_scene(rng, config, on, pick(rng, (word, word.upper(), word.capitalize())))


def chart_scene(rng: Rng, config: WorldConfig, on: Canvas) -> Scene:
    """Return a bar chart: no two bars of one colour, the tallest and the shortest clear of the others."""
    count = 3 + int(rng.integers(config.max_bars - 2))
    colours = shuffled(rng, visible_colours(config, on.background))[:count]
    left, right = 0.1 * on.width, 0.9 * on.width
    foot, reach = 0.88 * on.height, 0.78 * on.height
    slot = (right - left) / len(colours)
    width = slot * between(rng, (0.55, 0.8))
    heights = _clear_heights(rng, len(colours))
    bars = []
    for index, (colour, height) in enumerate(zip(colours, heights, strict=True)):
        start = left + slot * index + (slot - width) / 2
        box = (start, foot - reach * height, start + width, foot)
        bars.append(Bar(colour, _shade(rng, config, colour), box))
    return replace(on.scene(), bars=tuple(bars))


def nothing_scene(rng: Rng, on: Canvas) -> Scene:
    """Return a scene that holds nothing with a name."""
    if chance(rng, 0.5):
        return on.scene()
    return replace(on.scene(), background=replace(on.background, style="clouds", seed=int(rng.integers(1 << 31))))


@dataclass(frozen=True, slots=True)
class Clip:
    """Frames, and what happens: `event` is "moves", "turns", "appears", "disappears" or "stays".

    `index` is the thing it happens to; `detail` the direction or the new colour; `frame` (from 0) the first that shows
    the change.
    """

    frames: tuple[Scene, ...]
    event: str
    index: int
    detail: str
    frame: int

    @property
    def subject(self) -> Thing:
        """The thing it happens to, as it was first seen."""
        return self.frames[0 if self.event != "appears" else -1].things[self.index]


def clip(rng: Rng, config: WorldConfig, on: Canvas) -> Clip:
    """Return a clip of one or two things in which one thing happens, or nothing."""
    num_frames = 3 + int(rng.integers(config.max_frames - 2))
    event = pick(rng, ("moves", "moves", "moves", "turns", "appears", "disappears", "stays"))
    roomy = replace(config, thing_size=(0.2, 0.32))
    if event == "moves":
        return _moving(rng, roomy, on, num_frames)
    scene = shapes_scene(rng, roomy, on, 1 + int(rng.integers(2)))
    index = int(rng.integers(len(scene.things)))
    changed = 1 + int(rng.integers(num_frames - 1))
    if event == "stays":
        return Clip((scene,) * num_frames, event, index, "", 0)
    thing, without = scene.things[index], _without(scene, index)
    detail = ""
    if event == "turns":
        detail = pick(rng, [name for name in visible_colours(config, on.background) if name != thing.colour])
        recoloured = replace(thing, colour=detail, rgb=_shade(rng, config, detail))
        before, after = scene, _with(scene, index, recoloured)
    else:
        before, after = (without, scene) if event == "appears" else (scene, without)
    return Clip((before,) * changed + (after,) * (num_frames - changed), event, index, detail, changed)


def visible_colours(config: WorldConfig, background: Background) -> list[str]:
    """Return the colours that stand out from a background."""
    return [
        name
        for name in config.colours
        if min(_distance(COLOURS[name], background.first), _distance(COLOURS[name], background.second)) > _CONTRAST
    ]


def _moving(rng: Rng, config: WorldConfig, on: Canvas, num_frames: int) -> Clip:
    direction = pick(rng, tuple(DIRECTIONS))
    step_x, step_y = DIRECTIONS[direction]
    for _ in range(20):
        scene = shapes_scene(rng, config, on, 1 + int(rng.integers(2)))
        index = int(rng.integers(len(scene.things)))
        thing = scene.things[index]
        room = _room(scene, thing, step_x, step_y)
        least = 0.25 * (on.width if step_x else on.height)
        if room > least:
            stride = between(rng, (least, room)) / (num_frames - 1)
            frames = [
                _with(scene, index, replace(thing, x=thing.x + step_x * stride * n, y=thing.y + step_y * stride * n))
                for n in range(num_frames)
            ]
            if all(_apart(frame.things) for frame in frames):
                return Clip(tuple(frames), "moves", index, direction, 1)
    return Clip((scene,) * num_frames, "stays", index, "", 0)


def _room(scene: Scene, thing: Thing, step_x: int, step_y: int) -> float:
    """Return how far a thing can go before it leaves the picture."""
    left, top, right, bottom = thing.box
    if step_x:
        return scene.width - right - 1 if step_x > 0 else left - 1
    return scene.height - bottom - 1 if step_y > 0 else top - 1


def _apart(things: Sequence[Thing]) -> bool:
    return all(
        math.hypot(one.x - other.x, one.y - other.y) > 0.95 * (one.radius + other.radius)
        for index, one in enumerate(things)
        for other in things[:index]
    )


def _with(scene: Scene, index: int, thing: Thing) -> Scene:
    things = list(scene.things)
    things[index] = thing
    return replace(scene, things=tuple(things))


def _without(scene: Scene, index: int) -> Scene:
    return replace(scene, things=scene.things[:index] + scene.things[index + 1 :])


def background(rng: Rng, config: WorldConfig) -> Background:
    """Return any background."""
    red, green, blue = (int(value) for value in rng.integers(-8, 9, 3))
    base = pick(rng, _GROUNDS)
    first = _clipped(base[0] + red, base[1] + green, base[2] + blue)
    if not chance(rng, config.textured_share):
        return Background("plain", first, first)
    change = _TEXTURE_DIFFERENCE if sum(first) < 400 else -_TEXTURE_DIFFERENCE
    second = _clipped(*(value + change for value in first))
    return Background(pick(rng, _TEXTURES), first, second, int(rng.integers(1 << 31)))


def _names(rng: Rng, config: WorldConfig, background: Background, wanted: int) -> tuple[list[str], list[str]]:
    """Return colours and shapes to choose from; sometimes few, so that there is something to count."""
    colours = shuffled(rng, visible_colours(config, background))
    shapes = shuffled(rng, config.shapes)
    if wanted > 2 and chance(rng, 0.4):
        return colours[:2], shapes[:2]
    return colours, shapes


def _placed(
    rng: Rng,
    config: WorldConfig,
    on: Canvas,
    others: Sequence[Thing],
    wanted: int,
    colours: Sequence[str],
    shapes: Sequence[str],
) -> Thing | None:
    """Return one more thing, within the picture and clear of the others, or None if there is no room."""
    longer, shorter = max(on.width, on.height), min(on.width, on.height)
    smallest = config.thing_size[0] * longer
    largest = max(smallest, min(config.thing_size[1] * longer, _LARGEST[min(wanted, 5)] * shorter))
    colour, shape = pick(rng, colours), pick(rng, shapes)
    rgb, reach = _shade(rng, config, colour), _ANGLES.get(shape, 0.0)
    angle = between(rng, (-reach, reach))
    for _ in range(12):
        radius = between(rng, (smallest, largest)) / 2
        x, y = _centre(rng, on.width, radius), _centre(rng, on.height, radius)
        thing = Thing(shape, colour, rgb, x, y, radius, angle)
        if all(_is_clear(thing, other) for other in others):
            return thing
        largest = max(smallest, 0.9 * largest)
    return None


def _centre(rng: Rng, side: int, radius: float) -> float:
    """Return a coordinate; mostly one that is clearly in one third of the side."""
    low, high = radius + 1, side - radius - 1
    if high <= low:
        return side / 2
    for _ in range(4):
        value = between(rng, (low, high))
        if min(abs(value / side - 1 / 3), abs(value / side - 2 / 3)) > 0.06:
            break
    return value


def _is_clear(one: Thing, other: Thing) -> bool:
    distance = math.hypot(one.x - other.x, one.y - other.y)
    # Things of unlike colours may touch a little; of like colours they have to stay two things.
    share = 0.88 if _distance(one.rgb, other.rgb) > 1.5 * _CONTRAST else 1.08
    return distance > share * (one.radius + other.radius)


def written_scene(rng: Rng, config: WorldConfig, on: Canvas, text: str) -> Scene:
    """Return a scene with a text somewhere, in any face, colour and size that fits."""
    colour = pick(rng, visible_colours(config, on.background))
    face = pick(rng, FACES)
    lowest, highest = config.glyph_height
    size = round(between(rng, (lowest, highest)) * on.height / 0.7)  # a digit is about 0.7 of the font's size
    left, top, right, bottom = ink_box(text, face, size)
    room = 0.94
    if right - left > room * on.width or bottom - top > room * on.height:
        size = int(size * min(room * on.width / (right - left), room * on.height / (bottom - top)))
        left, top, right, bottom = ink_box(text, face, size)
    x = int(between(rng, (1, on.width - 1 - (right - left)))) - int(left)
    y = int(between(rng, (1, on.height - 1 - (bottom - top)))) - int(top)
    box = (left + x, top + y, right + x, bottom + y)
    return replace(on.scene(), writing=Writing(text, colour, _shade(rng, config, colour), face, size, x, y, box))


def _clear_heights(rng: Rng, count: int) -> list[float]:
    """Return heights from 0 to 1 of which the largest and the smallest differ from the rest."""
    while True:
        heights = [between(rng, (0.12, 1.0)) for _ in range(count)]
        ordered = sorted(heights)
        if ordered[-1] - ordered[-2] > 0.1 and ordered[1] - ordered[0] > 0.1:
            return heights


def _shade(rng: Rng, config: WorldConfig, colour: str) -> Rgb:
    reach = config.colour_jitter
    red, green, blue = (int(value) for value in rng.integers(-reach, reach + 1, 3))
    base = COLOURS[colour]
    return _clipped(base[0] + red, base[1] + green, base[2] + blue)


def _clipped(red: int, green: int, blue: int) -> Rgb:
    return min(255, max(0, red)), min(255, max(0, green)), min(255, max(0, blue))


def _distance(one: Rgb, other: Rgb) -> float:
    return math.dist(one, other)
