"""Dialogues whose last question means nothing without what was said before."""

from collections.abc import Callable

from examples.nano.world import wording
from examples.nano.world.chance import Rng, chance, pick, shuffled
from examples.nano.world.config import WorldConfig
from examples.nano.world.dialogue import Dialogue, Kind, Part, Turn
from examples.nano.world.questions import called, place_of, wanted
from examples.nano.world.reading import extreme
from examples.nano.world.scene import Scene, Thing
from examples.nano.world.vocabulary import plural
from examples.nano.world.wording import Wordings, a, ask, at

DialogueMaker = Callable[[Rng, Scene, WorldConfig], Dialogue | None]

_AND_COLOUR = ("And what colour is it?", "What colour is it?", "And its colour?", "Which colour does it have?")
_AND_WHERE = ("And where is it?", "Where is it?", "Where exactly?")
_AND_SHAPE = ("And what shape is it?", "What shape is it?", "And its shape?")
_AND_BOX = ("Draw a box around it.", "Give its bounding box.", "Where exactly? Give the box.")
_AND_THAT = ("And {that}?", "And what about {that}?", "What about {that}?")
_AND_HERE = ("And in this picture?", "And here?", "And in this image?", "What about this one?")


def about_it(rng: Rng, scene: Scene, config: WorldConfig) -> Dialogue | None:
    """Speak of one thing, then ask more about it."""
    thing = pick(rng, scene.things)
    openings = [*_opened_by_place(rng, scene, thing), *_opened_by_shape(rng, scene, thing), *_opened(rng, scene, thing)]
    if not openings:
        return None
    opening, known = pick(rng, openings)
    more = [turn for fact, turn in _more_about(rng, scene, thing, config) if fact not in known]
    if not more:
        return None
    chosen = shuffled(rng, more)
    return (opening, *chosen[: 2 if len(chosen) > 1 and chance(rng, 0.3) else 1])


def same_of_another(rng: Rng, scene: Scene, config: WorldConfig) -> Dialogue | None:
    """Ask for the colour, place or number of one thing, then only name another."""
    return pick(rng, (_colours_of_two, _places_of_two, _counts_of_two, _presence_of_two))(rng, scene, config)


def of_writing(rng: Rng, scene: Scene, config: WorldConfig) -> Dialogue | None:
    """Read, then ask about what was read."""
    writing = scene.writing
    assert writing is not None
    number = writing.is_number
    opening = _turn(
        rng, wording.NUMBER if number else wording.WORD, writing.text.lower(), Kind.NUMBER if number else Kind.WORD
    )
    more = [_turn(rng, _AND_COLOUR, writing.colour, Kind.FOLLOW_UP)]
    if place := scene.place_of(writing.box):
        more.append(_turn(rng, _AND_WHERE[:2], place, Kind.FOLLOW_UP))
    if number:
        more.append(_turn(rng, ("And its last digit?", "And the last digit?"), writing.text[-1], Kind.FOLLOW_UP))
        more.append(_turn(rng, ("And its first digit?", "And the first digit?"), writing.text[0], Kind.FOLLOW_UP))
    return opening, pick(rng, more)


def of_bars(rng: Rng, scene: Scene, config: WorldConfig) -> Dialogue | None:
    """Ask for the tallest bar, then the shortest, or the other way round."""
    first = chance(rng, 0.5)
    words = ("tallest", "shortest") if first else ("shortest", "tallest")
    opening = _turn(rng, wording.TALLEST, extreme(scene, tallest=first).colour, Kind.CHART, most=words[0])
    answer = extreme(scene, tallest=not first).colour
    return opening, _turn(rng, _AND_THAT, answer, Kind.FOLLOW_UP, that=f"the {words[1]}")


def of_another_picture(rng: Rng, scene: Scene, other: Scene, shown: Part) -> Dialogue | None:
    """Ask about one picture, then show another and ask the same of it."""
    questions: list[tuple[Wordings, str, str, Kind, dict[str, str]]] = []
    for shape in sorted({thing.shape for thing in scene.things} & {thing.shape for thing in other.things}):
        here, there = scene.find(shape=shape), other.find(shape=shape)
        if len(here) == len(there) == 1:
            it = {"it": f"the {shape}"}
            questions.append((wording.COLOUR, here[0].colour, there[0].colour, Kind.COLOUR, it))
            places = place_of(scene, here[0]), place_of(other, there[0])
            if places[0] and places[1]:
                questions.append((wording.POSITION, places[0], places[1], Kind.POSITION, it))
    if scene.count() == other.count() == 1:
        questions.append((wording.SHAPE_ALONE, scene.things[0].shape, other.things[0].shape, Kind.SHAPE, {}))
    if not questions or chance(rng, 0.3):
        them = {"them": wording.things(rng)}
        questions.append((wording.COUNT, str(scene.count()), str(other.count()), Kind.COUNT, them))
    wordings, first, second, kind, slots = pick(rng, questions)
    return _turn(rng, wordings, first, kind, **slots), _turn(rng, _AND_HERE, second, Kind.FOLLOW_UP).after(shown)


def _opened_by_place(rng: Rng, scene: Scene, thing: Thing) -> list[tuple[Turn, str]]:
    """Return first turns that speak of a thing by its place, each with what is known after it."""
    place = place_of(scene, thing)
    if place is None or scene.alone_in(place) is None:
        return []
    it = f"the object {at(place)}"
    shape = _turn(rng, wording.SHAPE, thing.shape, Kind.SHAPE, it=it)
    colour = _turn(rng, wording.COLOUR, thing.colour, Kind.COLOUR, it=it)
    return [(shape, "shape place"), (colour, "colour place")]


def _opened_by_shape(rng: Rng, scene: Scene, thing: Thing) -> list[tuple[Turn, str]]:
    if scene.count(shape=thing.shape) != 1:
        return []
    there = _turn(rng, wording.PRESENCE, "yes", Kind.PRESENCE, one=a(thing.shape))
    openings = [(there, "shape")]
    if place := place_of(scene, thing):
        openings.append((_turn(rng, wording.POSITION, place, Kind.POSITION, it=f"the {thing.shape}"), "shape place"))
    return openings


def _opened(rng: Rng, scene: Scene, thing: Thing) -> list[tuple[Turn, str]]:
    if scene.count(colour=thing.colour) != 1:
        return []
    name = f"{thing.colour} {wording.noun(rng)}"
    openings = [(_turn(rng, wording.PRESENCE, "yes", Kind.PRESENCE, one=a(name)), "colour")]
    if place := place_of(scene, thing):
        openings.append((_turn(rng, wording.POSITION, place, Kind.POSITION, it=f"the {name}"), "colour place"))
    return openings


def _more_about(rng: Rng, scene: Scene, thing: Thing, config: WorldConfig) -> list[tuple[str, Turn]]:
    """Return what else can be asked about a thing, each with the fact that it gives."""
    box = wording.grounded("it", scene.thousandths(thing.box, config.box_step))
    more = [
        ("colour", _turn(rng, _AND_COLOUR, thing.colour, Kind.FOLLOW_UP)),
        ("shape", _turn(rng, _AND_SHAPE, thing.shape, Kind.FOLLOW_UP)),
    ]
    if place := place_of(scene, thing):
        more.append(("place", _turn(rng, _AND_WHERE, place, Kind.FOLLOW_UP)))
    if chance(rng, 0.3):
        more.append(("box", _turn(rng, _AND_BOX, box, Kind.GROUNDING)))
    return more


def _colours_of_two(rng: Rng, scene: Scene, config: WorldConfig) -> Dialogue | None:
    two = _two_of_unlike_shape(rng, scene)
    if two is None:
        return None
    one, other = two
    opening = _turn(rng, wording.COLOUR, one.colour, Kind.COLOUR, it=f"the {one.shape}")
    return opening, _turn(rng, _AND_THAT, other.colour, Kind.FOLLOW_UP, that=f"the {other.shape}")


def _places_of_two(rng: Rng, scene: Scene, config: WorldConfig) -> Dialogue | None:
    two = _two_of_unlike_shape(rng, scene)
    places = [place_of(scene, thing) for thing in two or ()]
    if two is None or places[0] is None or places[1] is None:
        return None
    opening = _turn(rng, wording.POSITION, places[0], Kind.POSITION, it=f"the {two[0].shape}")
    return opening, _turn(rng, _AND_THAT, places[1], Kind.FOLLOW_UP, that=f"the {two[1].shape}")


def _counts_of_two(rng: Rng, scene: Scene, config: WorldConfig) -> Dialogue | None:
    shapes = sorted({thing.shape for thing in scene.things})
    first, second = pick(rng, shapes), pick(rng, shapes if chance(rng, 0.8) else config.shapes)
    if first == second:
        return None
    opening = _turn(rng, wording.COUNT, str(scene.count(shape=first)), Kind.COUNT, them=plural(first))
    answer = str(scene.count(shape=second))
    return opening, _turn(rng, _AND_THAT, answer, Kind.FOLLOW_UP, that=plural(second))


def _presence_of_two(rng: Rng, scene: Scene, config: WorldConfig) -> Dialogue | None:
    first = wanted(rng, scene, config, there=chance(rng, 0.5))
    second = wanted(rng, scene, config, there=chance(rng, 0.5))
    if first == second:
        return None
    answers = ["yes" if scene.find(*pair) else "no" for pair in (first, second)]
    opening = _turn(rng, wording.PRESENCE, answers[0], Kind.PRESENCE, one=a(called(rng, *first)))
    return opening, _turn(rng, _AND_THAT, answers[1], Kind.FOLLOW_UP, that=a(called(rng, *second)))


def _two_of_unlike_shape(rng: Rng, scene: Scene) -> tuple[Thing, Thing] | None:
    single = [thing for thing in scene.things if scene.count(shape=thing.shape) == 1]
    if len(single) < 2:
        return None
    one, other = shuffled(rng, single)[:2]
    return one, other


def _turn(rng: Rng, wordings: Wordings, answer: str, kind: Kind, **slots: str) -> Turn:
    return Turn((ask(rng, wordings, **slots),), answer, kind)


SHAPE_MAKERS: tuple[tuple[DialogueMaker, float], ...] = ((about_it, 1.3), (same_of_another, 1.3))
WRITING_MAKERS: tuple[tuple[DialogueMaker, float], ...] = ((of_writing, 1.0),)
CHART_MAKERS: tuple[tuple[DialogueMaker, float], ...] = ((of_bars, 1.0),)
