"""Questions about one picture of shapes. Each maker returns a turn, or None where the picture does not allow it."""

from collections.abc import Callable

from examples.nano.world import wording
from examples.nano.world.chance import Rng, chance, pick
from examples.nano.world.config import WorldConfig
from examples.nano.world.dialogue import Kind, Turn
from examples.nano.world.scene import Scene, Thing
from examples.nano.world.vocabulary import plural
from examples.nano.world.wording import Wordings, a, ask, at

Maker = Callable[[Rng, Scene, WorldConfig], Turn | None]
_OUTSIDE = ("dog", "cat", "person", "car", "tree", "house", "number", "word", "bar chart")


def shape(rng: Rng, scene: Scene, config: WorldConfig) -> Turn | None:
    """Ask for the shape of a thing known by its colour or place."""
    if scene.count() == 1 and chance(rng, 0.5):
        return _turn(rng, wording.SHAPE_ALONE, scene.things[0].shape, Kind.SHAPE)
    thing = pick(rng, scene.things)
    phrases = by_place(scene, thing)
    if scene.count(colour=thing.colour) == 1:
        phrases.append(f"the {thing.colour} {wording.noun(rng)}")
    return _turn(rng, wording.SHAPE, thing.shape, Kind.SHAPE, it=pick(rng, phrases)) if phrases else None


def colour(rng: Rng, scene: Scene, config: WorldConfig) -> Turn | None:
    """Ask for the colour of a thing known by its shape or place."""
    thing = pick(rng, scene.things)
    phrases = by_place(scene, thing)
    if scene.count(shape=thing.shape) == 1:
        phrases += [f"the {thing.shape}"] * 2
    if scene.count() == 1:
        phrases += ["it", f"the {wording.noun(rng)}"]
    return _turn(rng, wording.COLOUR, thing.colour, Kind.COLOUR, it=pick(rng, phrases)) if phrases else None


def object_(rng: Rng, scene: Scene, config: WorldConfig) -> Turn | None:
    """Ask what is at one of the nine places."""
    thing = pick(rng, scene.things)
    place = place_of(scene, thing)
    if place is None or scene.alone_in(place) is None:
        return None
    return _turn(rng, wording.OBJECT, a(thing.name), Kind.OBJECT, there=at(place))


def describe(rng: Rng, scene: Scene, config: WorldConfig) -> Turn | None:
    """Ask for everything, from left to right."""
    ordered = scene.from_left_to_right()
    if ordered is None or len(ordered) > 4:
        return None
    return _turn(rng, wording.DESCRIBE, wording.listed([a(thing.name) for thing in ordered]), Kind.DESCRIBE)


def listing(rng: Rng, scene: Scene, config: WorldConfig) -> Turn | None:
    """Ask for all colours or shapes, each said once, from left to right."""
    ordered = scene.from_left_to_right()
    if ordered is None or len(ordered) > 4:
        return None
    by_colour = chance(rng, 0.5)
    what = pick(rng, ("colours", "colors")) if by_colour else "shapes"
    named = dict.fromkeys(thing.colour if by_colour else thing.shape for thing in ordered)
    return _turn(rng, wording.LISTED, wording.listed(list(named)), Kind.DESCRIBE, what=what)


def count(rng: Rng, scene: Scene, config: WorldConfig) -> Turn | None:
    """Ask how many things, or things of a colour or shape, there are."""
    draw = rng.random()
    if draw < 0.3:
        return _turn(rng, wording.COUNT, str(scene.count()), Kind.COUNT, them=wording.things(rng))
    if draw < 0.6:
        name = pick(rng, config.colours) if chance(rng, 0.15) else pick(rng, scene.things).colour
        them = f"{name} {wording.things(rng)}"
        return _turn(rng, wording.COUNT, str(scene.count(colour=name)), Kind.COUNT, them=them)
    name = pick(rng, config.shapes) if chance(rng, 0.15) else pick(rng, scene.things).shape
    return _turn(rng, wording.COUNT, str(scene.count(shape=name)), Kind.COUNT, them=plural(name))


def position(rng: Rng, scene: Scene, config: WorldConfig) -> Turn | None:
    """Ask in which of the nine places a thing is."""
    thing = pick(rng, scene.things)
    place, phrases = place_of(scene, thing), wording.names(scene, thing, rng)
    if place is None or not phrases:
        return None
    return _turn(rng, wording.POSITION, place, Kind.POSITION, it=pick(rng, phrases))


def presence(rng: Rng, scene: Scene, config: WorldConfig) -> Turn | None:
    """Ask whether a colour, a shape or both together are there; half of the time they are."""
    if chance(rng, 0.06):
        return _turn(rng, wording.PRESENCE, "no", Kind.PRESENCE, one=a(pick(rng, _OUTSIDE)))
    wanted_colour, wanted_shape = wanted(rng, scene, config, there=chance(rng, 0.5))
    answer = "yes" if scene.find(wanted_colour, wanted_shape) else "no"
    return _turn(rng, wording.PRESENCE, answer, Kind.PRESENCE, one=a(called(rng, wanted_colour, wanted_shape)))


def grounding(rng: Rng, scene: Scene, config: WorldConfig) -> Turn | None:
    """Ask for the box of a thing."""
    thing = pick(rng, scene.things)
    phrases = wording.names(scene, thing, rng)
    if not phrases:
        return None
    phrase = pick(rng, phrases)
    answer = wording.grounded(phrase, scene.thousandths(thing.box, config.box_step))
    return _turn(rng, wording.GROUNDING, answer, Kind.GROUNDING, it=phrase)


def absent(rng: Rng, scene: Scene, config: WorldConfig) -> Turn | None:
    """Ask about a thing that is not there."""
    wanted_colour, wanted_shape = wanted(rng, scene, config, there=False)
    if wanted_shape is None or scene.find(wanted_colour, wanted_shape):
        return None
    name = called(rng, wanted_colour, wanted_shape)
    wordings = wording.POSITION if wanted_colour else pick(rng, (wording.POSITION, wording.COLOUR))
    return _turn(rng, wordings, f"there is no {name}", Kind.ABSENT, it=f"the {name}")


def wanted(rng: Rng, scene: Scene, config: WorldConfig, *, there: bool) -> tuple[str | None, str | None]:
    """Return a colour, a shape or both to ask for. Those that are not there differ by little from what is."""
    thing = pick(rng, scene.things)
    form = pick(rng, ("colour", "shape", "both"))
    if there:
        return (None if form == "shape" else thing.colour), (None if form == "colour" else thing.shape)
    if form == "colour":
        return pick(rng, config.colours), None
    if form == "shape":
        return None, pick(rng, config.shapes)
    if chance(rng, 0.4):
        return thing.colour, pick(rng, config.shapes)
    return pick(rng, config.colours), pick(rng, scene.things if chance(rng, 0.7) else (thing,)).shape


def called(rng: Rng, wanted_colour: str | None, wanted_shape: str | None) -> str:
    """Return the name of things of a colour and shape."""
    return " ".join(filter(None, (wanted_colour, wanted_shape or wording.noun(rng))))


def by_place(scene: Scene, thing: Thing) -> list[str]:
    """Return the phrase that names a thing by its place, if there is one."""
    place = place_of(scene, thing)
    return [f"the object {at(place)}"] if place and scene.alone_in(place) is thing else []


def place_of(scene: Scene, thing: Thing) -> str | None:
    """Return the place of one of the scene's things."""
    return scene.places[scene.things.index(thing)]


def _turn(rng: Rng, wordings: Wordings, answer: str, kind: Kind, **slots: str) -> Turn:
    return Turn((ask(rng, wordings, **slots),), answer, kind)


MAKERS: tuple[tuple[Maker, float], ...] = (
    (shape, 1.2),
    (colour, 1.2),
    (object_, 1.0),
    (describe, 1.0),
    (listing, 0.5),
    (count, 2.0),
    (position, 2.0),
    (presence, 1.2),
    (grounding, 5.0),
    (absent, 0.7),
)
