"""Questions about numbers, words, bar charts, and pictures with nothing in them."""

from examples.nano.world import wording
from examples.nano.world.chance import Rng, chance, pick
from examples.nano.world.config import WorldConfig
from examples.nano.world.dialogue import Kind, Turn
from examples.nano.world.questions import Maker
from examples.nano.world.scene import Bar, Scene, Writing
from examples.nano.world.vocabulary import plural
from examples.nano.world.wording import Wordings, a, ask

_ORDINALS = (("first", "first"), ("second", "second"), ("third", "third"), ("last", "last"))


def read(rng: Rng, scene: Scene, config: WorldConfig) -> Turn | None:
    """Ask what is written. Words are answered in small letters."""
    writing = _writing(scene)
    own = wording.NUMBER if writing.is_number else wording.WORD
    kind = Kind.NUMBER if writing.is_number else Kind.WORD
    return _turn(rng, wording.READ if chance(rng, 0.2) else own, writing.text.lower(), kind)


def digit(rng: Rng, scene: Scene, config: WorldConfig) -> Turn | None:
    """Ask for one digit of a number, or how many there are."""
    writing = _writing(scene)
    if not writing.is_number:
        return None
    if chance(rng, 0.25):
        return _turn(rng, wording.NUM_DIGITS, str(len(writing.text)), Kind.DIGIT)
    which, order = pick(rng, _ORDINALS)
    index = len(writing.text) - 1 if which == "last" else [name for name, _ in _ORDINALS].index(which)
    if index >= len(writing.text):
        return None
    return _turn(rng, wording.DIGIT, writing.text[index], Kind.DIGIT, which=which, order=order)


def writing_colour(rng: Rng, scene: Scene, config: WorldConfig) -> Turn | None:
    """Ask for the colour of the writing."""
    writing = _writing(scene)
    return _turn(rng, wording.COLOUR, writing.colour, Kind.COLOUR, it=f"the {_sort(writing)}")


def writing_position(rng: Rng, scene: Scene, config: WorldConfig) -> Turn | None:
    """Ask where the writing is."""
    writing = _writing(scene)
    place = scene.place_of(writing.box)
    return _turn(rng, wording.POSITION, place, Kind.POSITION, it=f"the {_sort(writing)}") if place else None


def writing_presence(rng: Rng, scene: Scene, config: WorldConfig) -> Turn | None:
    """Ask whether there is a number, a word or a shape."""
    writing = _writing(scene)
    other = pick(rng, ("word" if writing.is_number else "number", pick(rng, config.shapes), "bar chart"))
    there = chance(rng, 0.5)
    return _turn(
        rng, wording.PRESENCE, "yes" if there else "no", Kind.PRESENCE, one=a(_sort(writing) if there else other)
    )


def writing_grounding(rng: Rng, scene: Scene, config: WorldConfig) -> Turn | None:
    """Ask for the box of the writing."""
    writing = _writing(scene)
    phrase = f"the {_sort(writing)}"
    answer = wording.grounded(phrase, scene.thousandths(writing.box, config.box_step))
    return _turn(rng, wording.GROUNDING, answer, Kind.GROUNDING, it=phrase)


def describe(rng: Rng, scene: Scene, config: WorldConfig) -> Turn | None:
    """Ask for everything in a picture that holds no things."""
    if scene.writing:
        answer = f"the {_sort(scene.writing)} {scene.writing.text.lower()}"
    elif scene.bars:
        answer = f"a bar chart with {len(scene.bars)} bars"
    else:
        answer = "nothing that I know"
    return _turn(rng, wording.DESCRIBE, answer, Kind.DESCRIBE)


def extreme_bar(rng: Rng, scene: Scene, config: WorldConfig) -> Turn | None:
    """Ask which bar is tallest or shortest."""
    tallest = chance(rng, 0.65)
    most = pick(rng, ("tallest", "highest")) if tallest else pick(rng, ("shortest", "lowest"))
    return _turn(rng, wording.TALLEST, extreme(scene, tallest=tallest).colour, Kind.CHART, most=most)


def count_bars(rng: Rng, scene: Scene, config: WorldConfig) -> Turn | None:
    """Ask how many bars there are."""
    return _turn(rng, wording.NUM_BARS, str(len(scene.bars)), Kind.CHART)


def compare_bars(rng: Rng, scene: Scene, config: WorldConfig) -> Turn | None:
    """Ask whether one bar is taller than another that clearly differs."""
    first, second = rng.permutation(len(scene.bars))[:2]
    one, other = scene.bars[int(first)], scene.bars[int(second)]
    if abs(one.height - other.height) < 0.08 * scene.height:
        return None
    answer = "yes" if one.height > other.height else "no"
    return _turn(rng, wording.BARS, answer, Kind.CHART, one=one.colour, other=other.colour)


def count_nothing(rng: Rng, scene: Scene, config: WorldConfig) -> Turn | None:
    """Ask how many things there are where there are none."""
    them = plural(pick(rng, config.shapes)) if chance(rng, 0.5) else wording.things(rng)
    return _turn(rng, wording.COUNT, "0", Kind.COUNT, them=them)


def presence_of_nothing(rng: Rng, scene: Scene, config: WorldConfig) -> Turn | None:
    """Ask whether a thing is there where there are none."""
    return _turn(rng, wording.PRESENCE, "no", Kind.PRESENCE, one=a(pick(rng, config.shapes)))


def extreme(scene: Scene, *, tallest: bool) -> Bar:
    """Return the tallest or the shortest bar."""
    return (max if tallest else min)(scene.bars, key=lambda bar: bar.height)


def _sort(writing: Writing) -> str:
    return "number" if writing.is_number else "word"


def _writing(scene: Scene) -> Writing:
    assert scene.writing is not None
    return scene.writing


def _turn(rng: Rng, wordings: Wordings, answer: str, kind: Kind, **slots: str) -> Turn:
    return Turn((ask(rng, wordings, **slots),), answer, kind)


WRITING_MAKERS: tuple[tuple[Maker, float], ...] = (
    (read, 4.0),
    (digit, 1.5),
    (writing_colour, 0.7),
    (writing_position, 0.7),
    (writing_presence, 0.6),
    (writing_grounding, 1.2),
    (describe, 0.6),
)
CHART_MAKERS: tuple[tuple[Maker, float], ...] = (
    (extreme_bar, 3.0),
    (count_bars, 1.0),
    (compare_bars, 1.5),
    (describe, 0.7),
)
NOTHING_MAKERS: tuple[tuple[Maker, float], ...] = ((describe, 1.0), (count_nothing, 1.0), (presence_of_nothing, 1.0))
