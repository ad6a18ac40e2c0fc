"""Questions about two or three pictures shown together. Pictures are called Image-1, Image-2 and Image-3."""

from collections.abc import Callable, Sequence

from examples.nano.world import wording
from examples.nano.world.chance import Rng, chance, pick
from examples.nano.world.config import WorldConfig
from examples.nano.world.dialogue import Kind, Turn
from examples.nano.world.questions import called
from examples.nano.world.scene import Scene
from examples.nano.world.wording import Wordings, a, ask

Scenes = Sequence[Scene]
ComparingMaker = Callable[[Rng, Scenes, WorldConfig], Turn | None]

_NUMBER_IN: Wordings = ("What number is", "Which number is", "What is written")
_OBJECT_IN: Wordings = ("What is", "Which object is", "What do you see")
_COUNT_IN: Wordings = ("How many {them} are", "How many {them} do you see")
_COLOUR_IN: Wordings = ("What colour is the {shape}", "What color is the {shape}", "Which colour has the {shape}")


def which_shows(rng: Rng, scenes: Scenes, config: WorldConfig) -> Turn | None:
    """Ask which picture shows something that only one of them shows."""
    index = int(rng.integers(len(scenes)))
    scene = scenes[index]
    if scene.writing:
        one = f"the number {scene.writing.text}"
        alone = [other.writing.text for other in scenes if other.writing].count(scene.writing.text) == 1
    else:
        thing = pick(rng, scene.things)
        colour, shape = pick(rng, ((thing.colour, None), (None, thing.shape), (thing.colour, thing.shape)))
        one = a(called(rng, colour, shape))
        alone = sum(bool(other.find(colour, shape)) for other in scenes) == 1
    return _turn(rng, scenes, wording.WHICH_SHOWS, image(index), one=one) if alone else None


def which_has_more(rng: Rng, scenes: Scenes, config: WorldConfig) -> Turn | None:
    """Ask which picture has more, or fewer, things than every other."""
    counts = [scene.count() for scene in scenes]
    many = chance(rng, 0.6)
    best = max(counts) if many else min(counts)
    if any(scene.writing for scene in scenes) or counts.count(best) != 1:
        return None
    more = ("more", "fewer") if len(scenes) == 2 else ("the most", "the fewest")
    return _turn(rng, scenes, wording.WHICH_MORE, image(counts.index(best)), more=more[0 if many else 1])


def same(rng: Rng, scenes: Scenes, config: WorldConfig) -> Turn | None:
    """Ask whether two pictures of one thing each agree in shape or colour."""
    if len(scenes) != 2 or any(scene.count() != 1 for scene in scenes):
        return None
    one, other = scenes[0].things[0], scenes[1].things[0]
    if chance(rng, 0.5):
        return _turn(rng, scenes, wording.SAME, "yes" if one.shape == other.shape else "no", what="shape")
    what = pick(rng, ("colour", "color"))
    return _turn(rng, scenes, wording.SAME, "yes" if one.colour == other.colour else "no", what=what)


def about_one(rng: Rng, scenes: Scenes, config: WorldConfig) -> Turn | None:
    """Ask something about one of the pictures, which the question names."""
    index = int(rng.integers(len(scenes)))
    scene, here = scenes[index], f" in {image(index)}?"
    if scene.writing:
        return _turn(rng, scenes, _ended(_NUMBER_IN, here), scene.writing.text)
    if scene.count() == 1 and chance(rng, 0.4):
        return _turn(rng, scenes, _ended(_OBJECT_IN, here), a(scene.things[0].name))
    if chance(rng, 0.3):
        return _turn(rng, scenes, _ended(_COUNT_IN, here), str(scene.count()), them=wording.things(rng))
    thing = pick(rng, scene.things)
    if scene.count(shape=thing.shape) != 1:
        return None
    return _turn(rng, scenes, _ended(_COLOUR_IN, here), thing.colour, shape=thing.shape)


def image(index: int) -> str:
    """Return what a picture is called, by its index."""
    return f"Image-{index + 1}"


def _ended(wordings: Wordings, end: str) -> Wordings:
    return tuple(start + end for start in wordings)


def _turn(rng: Rng, scenes: Scenes, wordings: Wordings, answer: str, **slots: str) -> Turn:
    kind = Kind.COMPARE if len(scenes) == 2 else Kind.COMPARE_THREE
    return Turn((ask(rng, wordings, **slots),), answer, kind)


MAKERS: tuple[tuple[ComparingMaker, float], ...] = (
    (which_shows, 1.5),
    (which_has_more, 1.0),
    (same, 1.5),
    (about_one, 2.0),
)
