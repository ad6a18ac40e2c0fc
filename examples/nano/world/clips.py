"""Questions about the frames of a clip, called Frame1, Frame2 and so on."""

from collections.abc import Callable

from examples.nano.world import wording
from examples.nano.world.chance import Rng, chance, pick
from examples.nano.world.compose import Clip
from examples.nano.world.dialogue import Dialogue, Kind, Turn
from examples.nano.world.wording import Wordings, a, ask

ClipMaker = Callable[[Rng, Clip], Dialogue | None]
_EVENTS = {"appears": "appear", "disappears": "disappear", "turns": "change"}


def direction(rng: Rng, clip: Clip) -> Dialogue | None:
    """Ask which way the thing moves."""
    if clip.event != "moves":
        return None
    return (_turn(rng, wording.WAY, clip.detail, Kind.DIRECTION, it=_name(rng, clip)),)


def mover(rng: Rng, clip: Clip) -> Dialogue | None:
    """Ask what moves, and sometimes then where to."""
    if clip.event not in ("moves", "stays"):
        return None
    if clip.event == "stays":
        return (_turn(rng, wording.MOVER, "nothing", Kind.CHANGE),)
    first = _turn(rng, wording.MOVER, f"the {clip.subject.name}", Kind.CHANGE)
    if chance(rng, 0.5):
        return (first,)
    return first, _turn(rng, ("Which way?", "In which direction?", "And where to?"), clip.detail, Kind.FOLLOW_UP)


def change(rng: Rng, clip: Clip) -> Dialogue | None:
    """Ask what happens."""
    subject = clip.subject.name
    answer = {
        "moves": f"the {subject} moves {clip.detail}",
        "turns": f"the {subject} turns {clip.detail}",
        "appears": f"{a(subject)} appears",
        "disappears": f"the {subject} disappears",
        "stays": "nothing",
    }[clip.event]
    return (_turn(rng, wording.CHANGE, answer, Kind.CHANGE),)


def when(rng: Rng, clip: Clip) -> Dialogue | None:
    """Ask for the first frame that shows the change."""
    if clip.event not in _EVENTS:
        return None
    it = f"the {clip.subject.shape}" if clip.event == "turns" else f"the {clip.subject.name}"
    if clip.event == "turns" and clip.frames[0].count(shape=clip.subject.shape) != 1:
        return None
    return (_turn(rng, wording.WHEN, frame(clip.frame), Kind.FRAME, it=it, event=_EVENTS[clip.event]),)


def about_frame(rng: Rng, clip: Clip) -> Dialogue | None:
    """Ask something about one frame, which the question names."""
    index = int(rng.integers(len(clip.frames)))
    scene = clip.frames[index]
    if not scene.things or chance(rng, 0.35):
        wordings: Wordings = ("How many {them} are in {frame}?", "How many {them} does {frame} show?")
        answer = str(scene.count())
        return (_turn(rng, wordings, answer, Kind.FRAME, them=wording.things(rng), frame=frame(index)),)
    thing = pick(rng, scene.things)
    if scene.count(shape=thing.shape) != 1:
        return None
    wordings = ("What colour is the {shape} in {frame}?", "What color is the {shape} in {frame}?")
    return (_turn(rng, wordings, thing.colour, Kind.FRAME, shape=thing.shape, frame=frame(index)),)


def frame(index: int) -> str:
    """Return what a frame is called, by its index."""
    return f"Frame{index + 1}"


def _name(rng: Rng, clip: Clip) -> str:
    scene = clip.frames[0]
    return pick(rng, wording.names(scene, clip.subject, rng) or ["it"])


def _turn(rng: Rng, wordings: Wordings, answer: str, kind: Kind, **slots: str) -> Turn:
    return Turn((ask(rng, wordings, **slots),), answer, kind)


MAKERS: tuple[tuple[ClipMaker, float], ...] = (
    (direction, 2.5),
    (mover, 1.0),
    (change, 2.0),
    (when, 1.5),
    (about_frame, 1.5),
)
